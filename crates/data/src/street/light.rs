//! Sun and sky light.

use super::canvas::{Canvas, Color, View};

/// Where light comes from and what it brings.
#[derive(Clone, Copy, Debug)]
pub(super) struct Light {
    /// Direction to the sun, of length 1.
    pub(super) to_sun: Color,
    /// Light from the whole sky.
    pub(super) ambient: Color,
    /// Light of the sun on a surface that faces it.
    pub(super) sun: Color,
    /// Share of the light on open ground that is the sun's: what a shadow takes away.
    pub(super) sun_share: f32,
}

impl Light {
    /// Light on a surface with the given normal; `sunlit` 0 in shadow, 1 in the open.
    pub(super) fn on(&self, normal: Color, sunlit: f32) -> Color {
        let facing: f32 = (0..3).map(|i| normal[i] * self.to_sun[i]).sum();
        let sun = facing.max(0.0) * sunlit;
        std::array::from_fn(|i| self.ambient[i] * (0.8 + 0.2 * normal[1]) + self.sun[i] * sun)
    }

    /// Throws the shadow of an upright thing of width `w`, from height `low` to `high`, standing at (x, z).
    pub(super) fn throw(&self, canvas: &mut Canvas, view: &View, [x, z]: [f32; 2], w: f32, [low, high]: [f32; 2]) {
        if self.sun_share < 0.08 || self.to_sun[1] < 0.08 {
            return;
        }
        let away = [-self.to_sun[0] / self.to_sun[1], -self.to_sun[2] / self.to_sun[1]];
        let length = (away[0] * away[0] + away[1] * away[1]).sqrt().max(1e-3);
        let across = [-away[1] / length * w * 0.5, away[0] / length * w * 0.5];
        let at = |h: f32, side: f32| [x + away[0] * h + side * across[0], z + away[1] * h + side * across[1]];
        let corners = [at(low, -1.0), at(low, 1.0), at(high, 1.0), at(high, -1.0)];
        canvas.shade_ground(view, corners, 1.0 - self.sun_share * 0.8);
    }

    /// Darkens the ground right under a thing.
    pub(super) fn contact(canvas: &mut Canvas, view: &View, x: [f32; 2], z: [f32; 2]) {
        canvas.shade_ground(view, [[x[0], z[0]], [x[1], z[0]], [x[1], z[1]], [x[0], z[1]]], 0.5);
    }
}
