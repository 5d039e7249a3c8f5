//! What stands along a street: trees, hedges, poles, signs, fences, bins.

use super::canvas::{Canvas, Color, Paint, View, scale, times};
use super::ids;
use super::light::Light;
use super::noise::{cloud, floor, hash_unit, noise, phase};
use crate::classes::VOID;

/// A tree: a trunk under a crown of round clumps.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    pub(super) trunk: [f32; 2],
    pub(super) bark: Color,
    pub(super) leaf: Color,
    /// Middle (from the trunk, above the ground) and radius of each clump.
    pub(super) clumps: Vec<[f32; 3]>,
    /// Leafless: the crown lets what is behind shine through.
    pub(super) bare: bool,
    pub(super) salt: u32,
}

impl Tree {
    fn bounds(&self) -> ([f32; 2], f32) {
        let left = self.clumps.iter().map(|c| c[0] - c[2] * 1.3).fold(-self.trunk[0], f32::min);
        let right = self.clumps.iter().map(|c| c[0] + c[2] * 1.3).fold(self.trunk[0], f32::max);
        let top = self.clumps.iter().map(|c| c[1] + c[2] * 1.3).fold(self.trunk[1], f32::max);
        ([left, right], top)
    }

    pub(super) fn shadow(&self, canvas: &mut Canvas, view: &View, light: &Light, at: [f32; 2]) {
        let ([left, right], top) = self.bounds();
        light.throw(canvas, view, at, self.trunk[0] * 2.0, [0.0, self.trunk[1]]);
        light.throw(canvas, view, at, (right - left) * 0.75, [self.trunk[1] * 0.8, top * 0.9]);
    }

    pub(super) fn paint(&self, canvas: &mut Canvas, view: &View, light: &Light, [x, z]: [f32; 2]) {
        let ([left, right], top) = self.bounds();
        let thin = 1.1 * z / view.camera.focal;
        let half = self.trunk[0].max(thin * 0.6);
        let bark_light = light.on([0.0, 0.0, -1.0], 1.0);
        canvas.facing(view, [x - half, x + half], [0.0, self.trunk[1]], z, |px, y| {
            let ridges = 1.0 + 0.35 * noise((px - x) * 16.0, y * 3.0, self.salt);
            Paint::solid(times(scale(self.bark, ridges), bark_light), ids::TREE)
        });
        let leaf_light = light.on([0.0, 0.5, -0.8], 1.0);
        let side = light.to_sun[0] * light.sun_share;
        canvas.facing(view, [x + left, x + right], [0.0, top], z, |px, y| {
            let dx = px - x;
            let rough = 1.0 + 0.55 * cloud(dx * 1.6, y * 1.6, self.salt);
            let inside = |c: &&[f32; 3]| (dx - c[0]).powi(2) + (y - c[1]).powi(2) < c[2] * c[2] * rough;
            let clump = self.clumps.iter().find(inside)?;
            let leaves = noise(dx * 6.5, y * 6.5, self.salt ^ 7);
            if self.bare {
                let twigs = noise(dx * 5.0 + y, y * 1.4, self.salt ^ 3).abs() < 0.3;
                let cover = if twigs { 0.8 } else { 0.25 };
                return Some(Paint { color: times(self.bark, bark_light), id: ids::TREE, cover });
            }
            if leaves > 0.86 {
                return None;
            }
            let (ox, oy) = ((dx - clump[0]) / clump[2], (y - clump[1]) / clump[2]);
            let shape = 0.82 + 0.25 * oy + 0.3 * ox * side + 0.42 * leaves;
            Paint::solid(times(scale(self.leaf, shape.max(0.15)), leaf_light), ids::TREE)
        });
    }
}

/// Head of a pole.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PoleHead {
    None,
    /// An arm to the side, of this length, with a lamp.
    Arm(f32),
    Ball,
}

/// A lamp post, mast or bollard.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pole {
    pub(super) height: f32,
    pub(super) width: f32,
    pub(super) head: PoleHead,
    pub(super) color: Color,
}

impl Pole {
    pub(super) fn shadow(&self, canvas: &mut Canvas, view: &View, light: &Light, at: [f32; 2]) {
        light.throw(canvas, view, at, self.width, [0.0, self.height]);
    }

    pub(super) fn paint(&self, canvas: &mut Canvas, view: &View, light: &Light, [x, z]: [f32; 2]) {
        let lit = light.on([0.0, 0.0, -1.0], 1.0);
        // Never thinner than a sample and a bit, so that it shows and is labelled however far it stands.
        let half = (self.width * 0.5).max(view.camera.thin * z / view.camera.focal);
        canvas.facing(view, [x - half, x + half], [0.0, self.height], z, |px, y| {
            let round = 1.1 - 0.5 * ((px - x) / half + 0.3).powi(2) * 0.6;
            let foot = if y < 0.9 { 0.85 } else { 1.0 };
            Paint::solid(times(scale(self.color, round * foot), lit), ids::POLE)
        });
        match self.head {
            PoleHead::None => {}
            PoleHead::Arm(length) => {
                let x_range = if length > 0.0 { [x, x + length] } else { [x + length, x] };
                canvas.facing(view, x_range, [self.height - half * 2.0, self.height], z, |px, _| {
                    let lamp = (px - x) / length > 0.65;
                    Paint::solid(times(if lamp { [0.75, 0.74, 0.68] } else { self.color }, lit), ids::POLE)
                });
            }
            PoleHead::Ball => {
                let r = 0.22;
                canvas.facing(view, [x - r, x + r], [self.height - r, self.height + r], z, |px, y| {
                    let inside = (px - x).powi(2) + (y - self.height).powi(2) < r * r;
                    inside.then(|| Paint { color: times([0.8, 0.78, 0.7], lit), id: ids::POLE, cover: 1.0 })
                });
            }
        }
    }
}

/// Outline of a sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignShape {
    Round,
    Triangle,
    Board,
    /// A dark box with three lamps.
    TrafficLight,
}

/// A sign or traffic light on a post.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sign {
    pub(super) shape: SignShape,
    /// Width and height of the plate, in metres.
    pub(super) size: [f32; 2],
    /// Height of the plate's middle.
    pub(super) middle: f32,
    pub(super) rim: Color,
    pub(super) face: Color,
    pub(super) post: Color,
    pub(super) salt: u32,
}

impl Sign {
    fn at(&self, x: f32, y: f32) -> Option<Color> {
        let (a, b) = (x / (self.size[0] * 0.5), y / (self.size[1] * 0.5));
        let glyph = hash_unit((a * 2.5 + 9.0) as i32, (b * 2.5 + 9.0) as i32, self.salt) < 0.35;
        let inner = if glyph { scale(self.face, 0.45) } else { self.face };
        match self.shape {
            SignShape::Round => {
                let r = a * a + b * b;
                (r < 1.0).then_some(if r > 0.6 { self.rim } else { inner })
            }
            SignShape::Triangle => {
                let edge = 1.0 - (b + 1.0) * 0.5;
                (a.abs() < edge).then_some(if a.abs() > edge - 0.3 || b < -0.72 { self.rim } else { inner })
            }
            SignShape::Board => {
                (a.abs() < 1.0 && b.abs() < 1.0).then_some(if a.abs().max(b.abs()) > 0.85 { self.rim } else { inner })
            }
            SignShape::TrafficLight => {
                let lamp = floor(b * 1.5 + 1.5);
                let d = (a * self.size[0]).powi(2) + ((b * 1.5 + 1.0 - lamp as f32) * self.size[1] * 0.66).powi(2);
                let on = lamp as u32 == self.salt % 3;
                let colors = [[0.1, 0.9, 0.4], [1.0, 0.65, 0.1], [1.0, 0.15, 0.1]];
                (a.abs() < 1.0 && b.abs() < 1.0).then(|| {
                    if d < (self.size[0] * 0.62).powi(2) && on { colors[lamp.clamp(0, 2) as usize] } else { self.rim }
                })
            }
        }
    }

    pub(super) fn shadow(&self, canvas: &mut Canvas, view: &View, light: &Light, at: [f32; 2]) {
        light.throw(canvas, view, at, 0.08, [0.0, self.middle]);
    }

    pub(super) fn paint(&self, canvas: &mut Canvas, view: &View, light: &Light, [x, z]: [f32; 2]) {
        let post = Pole { height: self.middle, width: 0.09, head: PoleHead::None, color: self.post };
        post.paint(canvas, view, light, [x, z]);
        let lit = light.on([0.0, 0.1, -0.99], 1.0);
        let [w, h] = self.size;
        canvas.facing(view, [x - w * 0.5, x + w * 0.5], [self.middle - h * 0.5, self.middle + h * 0.5], z, |px, y| {
            self.at(px - x, y - self.middle).and_then(|c| Paint::solid(times(c, lit), ids::SIGN))
        });
    }
}

/// What a barrier is made of; hedge and wall belong to other classes than the fence they look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BarrierKind {
    Railing,
    Planks,
    Hedge,
    Wall,
}

/// A piece of fence, hedge or low wall, along the street from depth z on, or across it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Barrier {
    pub(super) kind: BarrierKind,
    pub(super) length: f32,
    pub(super) height: f32,
    pub(super) across: bool,
    pub(super) color: Color,
    pub(super) salt: u32,
}

impl Barrier {
    fn at(&self, s: f32, y: f32, metre: f32) -> Option<Paint> {
        let h = self.height;
        match self.kind {
            BarrierKind::Railing => {
                // Bars closer than a sample melt into an even veil.
                let fine = metre * 1.6 > 0.24;
                let bar = phase(s, 0.24) < 0.42 || phase(s, 1.9) < 0.05;
                let rail = (y - h * 0.94).abs() < 0.045 + metre * 0.4 || (y - h * 0.15).abs() < 0.035;
                let cover = match (rail, fine, bar) {
                    (true, _, _) | (_, false, true) => 1.0,
                    (_, true, _) => 0.6,
                    _ => 0.15,
                };
                Some(Paint { color: self.color, id: ids::FENCE, cover })
            }
            BarrierKind::Planks => {
                let plank = floor(s / 0.16);
                let top = h * (1.0 - 0.04 * hash_unit(plank, 1, self.salt));
                let gap = (s / 0.16 - plank as f32) < 0.14;
                let grain = 0.85 + 0.3 * hash_unit(plank, 2, self.salt) + 0.15 * noise(s * 9.0, y * 1.5, self.salt);
                (y < top)
                    .then(|| scale(self.color, if gap { 0.45 } else { grain }))
                    .and_then(|c| Paint::solid(c, ids::FENCE))
            }
            BarrierKind::Hedge => {
                let top = h * (0.93 + 0.12 * noise(s * 2.2, 0.3, self.salt));
                let leaves = 0.8 + 0.5 * noise(s * 7.0, y * 7.0, self.salt) + 0.2 * (y / h);
                (y < top).then(|| scale(self.color, leaves.max(0.2))).and_then(|c| Paint::solid(c, ids::TREE))
            }
            BarrierKind::Wall => {
                let course = floor(y / 0.11);
                let brick = hash_unit(floor((s + course as f32 * 0.12) / 0.24), course, self.salt);
                let joint = (y / 0.11 - course as f32) < 0.15;
                let cope = y > h - 0.1;
                let tone = if cope {
                    1.15
                } else if joint {
                    0.85
                } else {
                    0.85 + 0.3 * brick
                };
                Paint::solid(scale(self.color, tone), ids::BUILDING)
            }
        }
    }

    pub(super) fn shadow(&self, canvas: &mut Canvas, view: &View, light: &Light, [x, z]: [f32; 2]) {
        let (a, b) = if self.across { ([x, z], [x + self.length, z]) } else { ([x, z], [x, z + self.length]) };
        if light.sun_share < 0.08 || self.kind == BarrierKind::Railing || light.to_sun[1] < 0.08 {
            return;
        }
        let far = self.height / light.to_sun[1];
        let cast = |p: [f32; 2]| [p[0] - light.to_sun[0] * far, p[1] - light.to_sun[2] * far];
        canvas.shade_ground(view, [a, b, cast(b), cast(a)], 1.0 - 0.8 * light.sun_share);
    }

    pub(super) fn paint(&self, canvas: &mut Canvas, view: &View, light: &Light, [x, z]: [f32; 2]) {
        let focal = view.camera.focal;
        let show = |paint: Option<Paint>, lit: Color| paint.map(|p| Paint { color: times(p.color, lit), ..p });
        if self.across {
            let lit = light.on([0.0, 0.0, -1.0], 1.0);
            canvas.facing(view, [x, x + self.length], [0.0, self.height * 1.1], z, |px, y| {
                show(self.at(px, y, z / focal), lit)
            });
        } else {
            let lit = light.on([-x.signum(), 0.0, 0.0], 1.0);
            canvas.along(view, x, [z, z + self.length], [0.0, self.height * 1.1], |pz, y| {
                show(self.at(pz, y, pz / focal), lit)
            });
        }
    }
}

/// A bin, box or cabinet that no class covers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bin {
    pub(super) size: [f32; 2],
    pub(super) color: Color,
}

impl Bin {
    pub(super) fn shadow(&self, canvas: &mut Canvas, view: &View, light: &Light, at: [f32; 2]) {
        light.throw(canvas, view, at, self.size[0], [0.0, self.size[1]]);
    }

    pub(super) fn paint(&self, canvas: &mut Canvas, view: &View, light: &Light, [x, z]: [f32; 2]) {
        let lit = light.on([0.0, 0.0, -1.0], 1.0);
        let [w, h] = self.size;
        canvas.facing(view, [x - w * 0.5, x + w * 0.5], [0.0, h], z, |px, y| {
            let slot = (y / h - 0.8).abs() < 0.06 && ((px - x) / w).abs() < 0.3;
            let lid = y > h * 0.9;
            let tone = if slot {
                0.25
            } else if lid {
                1.2
            } else {
                1.0 - 0.25 * ((px - x) / w).abs()
            };
            Paint::solid(times(scale(self.color, tone), lit), VOID)
        });
    }
}
