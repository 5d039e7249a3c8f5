//! Cars, vans and buses, seen from behind, in front, along a side or across the street.

use super::canvas::{Canvas, Color, Paint, View, mix, scale, times};
use super::ids;
use super::light::Light;
use super::noise::noise;

/// Which way a vehicle stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heading {
    Away,
    Toward,
    Across,
}

/// A motor vehicle; (x, z) is the middle of its nearest edge.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vehicle {
    pub(super) heading: Heading,
    pub(super) width: f32,
    pub(super) height: f32,
    pub(super) length: f32,
    /// Height of the body under the windows, as a share of the height.
    pub(super) belt: f32,
    /// Lengths of bonnet and boot as shares of the length; 0 and 0 is a box.
    pub(super) ends: [f32; 2],
    pub(super) color: Color,
    pub(super) glass: Color,
    pub(super) lamps_on: bool,
    pub(super) salt: u32,
}

const TYRE: Color = [0.05, 0.05, 0.055];

impl Vehicle {
    /// Side view at `s` metres from the rear end: colour under white light.
    fn side(&self, s: f32, y: f32) -> Option<Color> {
        let (l, h) = (self.length, self.height);
        let wheel = 0.19 * h.min(1.7);
        for axle in [0.19 * l, 0.8 * l] {
            let r2 = (s - axle).powi(2) + (y - wheel).powi(2);
            if r2 < (wheel * 1.12).powi(2) {
                return Some(if r2 < (wheel * 0.55).powi(2) { [0.42, 0.42, 0.44] } else { TYRE });
            }
        }
        if y < 0.16 || y > h {
            return None;
        }
        let belt = self.belt * h;
        if y <= belt {
            let round = if self.ends[0] > 0.0 { (0.12 * l * (y / belt - 0.6).max(0.0)).min(0.3) } else { 0.0 };
            if s < round * 0.5 || s > l - round {
                return None;
            }
            if y > belt * 0.72 && (s < 0.05 * l || s > 0.95 * l) {
                return Some(if s < 0.5 * l { [0.5, 0.05, 0.04] } else { [0.85, 0.83, 0.75] });
            }
            let seam = (s - 0.46 * l).abs() < 0.02 || y < 0.3;
            let shine = 0.82 + 0.35 * (y / belt);
            return Some(scale(self.color, if seam { 0.55 } else { shine }));
        }
        // The cabin leans in from both ends.
        let t = (y - belt) / (h - belt);
        let rear = self.ends[1] * l + 0.07 * l * t * f32::from(self.ends[0] > 0.0);
        let front = l - self.ends[0] * l - 0.17 * l * t * f32::from(self.ends[0] > 0.0);
        if s < rear || s > front {
            return None;
        }
        let frame = t > 0.84 || s - rear < 0.12 || front - s < 0.12 || (s - 0.5 * (rear + front)).abs() < 0.06;
        Some(if frame { scale(self.color, 1.12) } else { self.window(s, t) })
    }

    fn window(&self, s: f32, t: f32) -> Color {
        let sheen = noise(s * 1.7, t * 2.0, self.salt);
        scale(self.glass, 0.75 + 0.3 * t + 0.25 * sheen)
    }

    /// View from behind or in front at `x` metres from the middle: colour under white light.
    fn end(&self, x: f32, y: f32) -> Option<Color> {
        let (half, h) = (self.width * 0.5, self.height);
        let ax = x.abs();
        if y < 0.32 && (half - 0.26..half - 0.03).contains(&ax) {
            return Some(TYRE);
        }
        if y < 0.2 || y > h {
            return None;
        }
        let belt = self.belt * h;
        if y <= belt {
            let corner =
                if self.ends[0] > 0.0 { 0.06 * ((y - belt * 0.75) / (belt * 0.25)).max(0.0).powi(2) } else { 0.0 };
            if ax > half - corner {
                return None;
            }
            let rear = self.heading == Heading::Away;
            if (belt * 0.58..belt * 0.88).contains(&y) && ax > half * 0.68 {
                let lit = if self.lamps_on { 1.7 } else { 1.0 };
                return Some(scale(if rear { [0.58, 0.06, 0.05] } else { [0.75, 0.74, 0.68] }, lit));
            }
            if (belt * 0.42..belt * 0.56).contains(&y) && ax < 0.27 {
                return Some(if rear { [0.8, 0.72, 0.2] } else { [0.85, 0.85, 0.82] });
            }
            if y < belt * 0.4 {
                return Some(scale(self.color, 0.42));
            }
            if !rear && (belt * 0.58..belt * 0.8).contains(&y) && ax < half * 0.55 {
                return Some([0.07, 0.07, 0.08]);
            }
            return Some(scale(self.color, 0.8 + 0.3 * y / belt));
        }
        let t = (y - belt) / (h - belt);
        let lean = if self.ends[0] > 0.0 { 0.22 } else { 0.0 };
        let edge = half - lean * t;
        if ax > edge {
            return None;
        }
        if t > 0.85 || ax > edge - 0.1 || t < 0.06 {
            return Some(scale(self.color, 1.1));
        }
        Some(self.window(x, t))
    }

    pub(super) fn shadow(&self, canvas: &mut Canvas, view: &View, light: &Light, [x, z]: [f32; 2]) {
        let (w, l) = self.footprint();
        light.throw(canvas, view, [x, z + l * 0.5], w.max(l) * 0.9, [0.0, self.height * 0.85]);
        Light::contact(canvas, view, [x - w * 0.5 - 0.1, x + w * 0.5 + 0.1], [z - 0.15, z + l]);
    }

    fn footprint(&self) -> (f32, f32) {
        if self.heading == Heading::Across { (self.length, self.width) } else { (self.width, self.length) }
    }

    pub(super) fn paint(&self, canvas: &mut Canvas, view: &View, light: &Light, [x, z]: [f32; 2]) {
        let (w, l) = self.footprint();
        let front_light = light.on([0.0, 0.25, -0.95], 1.0);
        let show = |color: Option<Color>, lit: Color| color.and_then(|c| Paint::solid(times(c, lit), ids::CAR));
        if self.heading == Heading::Across {
            let flip = self.salt & 1 == 0;
            canvas.facing(view, [x - w * 0.5, x + w * 0.5], [0.0, self.height], z, |px, y| {
                let s = if flip { px - x } else { x - px } + w * 0.5;
                show(self.side(s, y), front_light)
            });
            return;
        }
        // The side turned to the camera's axis, a little inside the corner so that no gap shows.
        let inner = x - x.signum() * w * 0.5;
        if inner * x > 0.0 {
            let lit = light.on([-x.signum() * 0.97, 0.25, 0.0], 1.0);
            canvas.along(view, inner, [z, z + l], [0.0, self.height], |pz, y| {
                let s = if self.heading == Heading::Away { pz - z } else { z + l - pz };
                show(self.side(s, y), lit)
            });
        }
        // A bonnet or boot is lower than the roof: the cabin stands further back.
        let set_back = l * if self.heading == Heading::Away { self.ends[1] } else { self.ends[0] };
        let belt = self.belt * self.height;
        let box_x = [x - w * 0.5, x + w * 0.5];
        canvas.facing(view, box_x, [belt, self.height], z + set_back, |px, y| show(self.end(px - x, y), front_light));
        if set_back > 0.1 {
            let top = light.on([0.0, 1.0, 0.0], 1.0);
            let sheet = times(mix(self.color, self.glass, 0.15), top);
            let rise = view.camera.eye - belt;
            if rise > 0.05 {
                // The lid between the two, seen from above, as a strip of rows above the belt of the near end.
                let strip = rise * set_back / (z + set_back);
                canvas.facing(view, [box_x[0] + 0.12, box_x[1] - 0.12], [belt, belt + strip], z, |_, _| {
                    Paint::solid(sheet, ids::CAR)
                });
            }
        }
        canvas.facing(view, box_x, [0.0, belt], z, |px, y| show(self.end(px - x, y), front_light));
    }
}
