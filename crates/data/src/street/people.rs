//! People on foot and on bicycles.

use super::canvas::{Canvas, Color, Paint, View, scale, times};
use super::ids;
use super::light::Light;
use super::noise::noise;

/// Distance test: within `r` of the segment from `a` to `b`.
fn limb(p: [f32; 2], a: [f32; 2], b: [f32; 2], r: f32) -> bool {
    let (dx, dy) = (b[0] - a[0], b[1] - a[1]);
    let t = (((p[0] - a[0]) * dx + (p[1] - a[1]) * dy) / (dx * dx + dy * dy).max(1e-6)).clamp(0.0, 1.0);
    (p[0] - a[0] - t * dx).powi(2) + (p[1] - a[1] - t * dy).powi(2) < r * r
}

/// Clothes and skin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clothes {
    pub(super) coat: Color,
    pub(super) legs: Color,
    pub(super) skin: Color,
    pub(super) hair: Color,
}

/// Someone on foot; all lengths in shares of the body's height.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pedestrian {
    pub(super) height: f32,
    pub(super) clothes: Clothes,
    /// Half the length of a step.
    pub(super) stride: f32,
    pub(super) breadth: f32,
    /// A coat reaches the knees.
    pub(super) long_coat: bool,
    /// Side and colour of a bag.
    pub(super) bag: Option<(f32, Color)>,
    pub(super) salt: u32,
}

impl Pedestrian {
    fn at(&self, x: f32, y: f32) -> Option<Color> {
        let p = [x, y];
        let c = &self.clothes;
        let b = self.breadth;
        if limb(p, [0.0, 0.925], [0.0, 0.95], 0.062) {
            return Some(if y > 0.955 || x.abs() > 0.045 { c.hair } else { c.skin });
        }
        if let Some((side, color)) = self.bag
            && limb(p, [side * (b + 0.05), 0.42], [side * (b + 0.05), 0.52], 0.07)
        {
            return Some(color);
        }
        let fold = 1.0 + 0.2 * noise(x * 22.0, y * 14.0, self.salt);
        let hem = if self.long_coat { 0.3 } else { 0.5 };
        if limb(p, [0.0, hem], [0.0, 0.75], b) && y > hem - 0.02 {
            return Some(scale(c.coat, fold));
        }
        for side in [-1.0, 1.0] {
            if limb(p, [side * b, 0.79], [side * (b + 0.035 + 0.3 * self.stride), 0.47], 0.036) {
                return Some(if y < 0.49 { c.skin } else { scale(c.coat, 0.85 * fold) });
            }
            if limb(p, [side * 0.04, 0.5], [side * (0.045 + self.stride), 0.03], 0.048) {
                return Some(if y < 0.05 { [0.06, 0.05, 0.05] } else { scale(c.legs, fold) });
            }
        }
        None
    }

    pub(super) fn shadow(&self, canvas: &mut Canvas, view: &View, light: &Light, at: [f32; 2]) {
        light.throw(canvas, view, at, 0.45, [0.0, self.height]);
        Light::contact(canvas, view, [at[0] - 0.25, at[0] + 0.25], [at[1] - 0.12, at[1] + 0.15]);
    }

    pub(super) fn paint(&self, canvas: &mut Canvas, view: &View, light: &Light, [x, z]: [f32; 2]) {
        let lit = light.on([0.0, 0.2, -0.95], 1.0);
        let half = self.height * 0.3;
        canvas.facing(view, [x - half, x + half], [0.0, self.height * 1.03], z, |px, y| {
            let color = self.at((px - x) / self.height, y / self.height)?;
            Paint::solid(times(color, lit), ids::PEDESTRIAN)
        });
    }
}

/// Someone on a bicycle; in the class list, both together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cyclist {
    pub(super) clothes: Clothes,
    pub(super) frame: Color,
    /// Seen from the side, and which way; otherwise from behind or in front.
    pub(super) side: Option<f32>,
    pub(super) size: f32,
    pub(super) helmet: bool,
    pub(super) salt: u32,
}

impl Cyclist {
    /// Colour and cover at a point, in metres of a cyclist of size 1.
    fn at(&self, x: f32, y: f32) -> Option<(Color, f32)> {
        let p = [x, y];
        let c = &self.clothes;
        let fold = 1.0 + 0.2 * noise(x * 13.0, y * 9.0, self.salt);
        let crown = if self.helmet { self.frame } else { c.hair };
        const R: f32 = 0.34;
        if self.side.is_some() {
            if limb(p, [0.3, 1.56], [0.3, 1.6], 0.115) {
                return Some((if y > 1.6 { crown } else { c.skin }, 1.0));
            }
            if limb(p, [0.2, 1.32], [0.5, 0.98], 0.055) {
                return Some((scale(c.coat, 0.85 * fold), 1.0));
            }
            if limb(p, [-0.12, 0.95], [0.2, 1.36], 0.17) {
                return Some((scale(c.coat, fold), 1.0));
            }
            for (knee, foot) in [([0.22, 0.75], [0.05, 0.25]), ([0.16, 0.62], [0.15, 0.18])] {
                if limb(p, [-0.12, 0.92], knee, 0.085) || limb(p, knee, foot, 0.065) {
                    return Some((scale(c.legs, fold), 1.0));
                }
            }
            let bars = [
                ([-0.52, R], [-0.14, 0.85]),
                ([-0.14, 0.82], [0.42, 0.82]),
                ([0.05, R], [0.42, 0.82]),
                ([0.42, 0.95], [0.55, R]),
                ([-0.52, R], [0.05, R]),
            ];
            if bars.iter().any(|(a, b)| limb(p, *a, *b, 0.035)) {
                return Some((self.frame, 1.0));
            }
            for hub in [-0.52, 0.55] {
                let d = ((x - hub).powi(2) + (y - R).powi(2)).sqrt();
                if d < R {
                    return Some(([0.06, 0.06, 0.06], if d > R - 0.07 { 1.0 } else { 0.25 }));
                }
            }
            return None;
        }
        if limb(p, [0.0, 1.55], [0.0, 1.6], 0.11) {
            return Some((if y > 1.58 { crown } else { c.skin }, 1.0));
        }
        if limb(p, [0.0, 0.98], [0.0, 1.3], 0.21) {
            return Some((scale(c.coat, fold), 1.0));
        }
        for side in [-1.0, 1.0] {
            if limb(p, [side * 0.2, 1.38], [side * 0.3, 1.02], 0.06) {
                return Some((scale(c.coat, 0.85 * fold), 1.0));
            }
            let lift = if side > 0.0 { 0.22 } else { 0.0 };
            if limb(p, [side * 0.09, 0.92], [side * 0.13, 0.3 + lift], 0.085) {
                return Some((scale(c.legs, fold), 1.0));
            }
        }
        if limb(p, [-0.3, 1.0], [0.3, 1.0], 0.03) || limb(p, [0.0, 0.05], [0.0, 0.66], 0.045) {
            return Some((if y < 0.7 { [0.05, 0.05, 0.05] } else { self.frame }, 1.0));
        }
        None
    }

    pub(super) fn shadow(&self, canvas: &mut Canvas, view: &View, light: &Light, at: [f32; 2]) {
        let half = if self.side.is_some() { 0.8 } else { 0.25 };
        light.throw(canvas, view, at, half * 1.5, [0.0, 1.6 * self.size]);
        Light::contact(canvas, view, [at[0] - half, at[0] + half], [at[1] - 0.1, at[1] + 0.2]);
    }

    pub(super) fn paint(&self, canvas: &mut Canvas, view: &View, light: &Light, [x, z]: [f32; 2]) {
        let lit = light.on([0.0, 0.2, -0.95], 1.0);
        let half = if self.side.is_some() { 0.95 } else { 0.4 } * self.size;
        let way = self.side.unwrap_or(1.0) / self.size;
        canvas.facing(view, [x - half, x + half], [0.0, 1.75 * self.size], z, |px, y| {
            let (color, cover) = self.at((px - x) * way, y / self.size)?;
            Some(Paint { color: times(color, lit), id: ids::BICYCLIST, cover })
        });
    }
}
