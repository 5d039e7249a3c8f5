//! Buildings: walls with storeys and windows, shop fronts, roofs.

use super::canvas::{Canvas, Color, Paint, View, mix, scale, times};
use super::ids;
use super::light::Light;
use super::noise::{floor, hash_unit, noise};

/// A block with a wall along the street and one facing the camera.
#[derive(Clone, Copy, Debug)]
pub(super) struct Building {
    /// Lateral place of the wall along the street, and of the far end of the wall facing the camera.
    pub(super) x: [f32; 2],
    pub(super) z: [f32; 2],
    pub(super) height: f32,
    /// Height of the roof above the wall.
    pub(super) roof: f32,
    pub(super) wall: Color,
    pub(super) roof_color: Color,
    pub(super) trim: Color,
    pub(super) glass: Color,
    pub(super) storey: f32,
    pub(super) bay: f32,
    /// Width and height of a window as shares of bay and storey.
    pub(super) window: [f32; 2],
    /// Colour of a shop's band over the ground floor, where there is a shop.
    pub(super) shop: Option<Color>,
    /// Strength of the wall's texture.
    pub(super) grain: f32,
    pub(super) salt: u32,
}

impl Building {
    /// Colour under white light at `s` metres along a wall and height `y`; `None` above it.
    fn facade(&self, s: f32, y: f32) -> Option<Color> {
        if y > self.height {
            let over = y - self.height;
            let chimney = hash_unit(floor(s / 1.1), 77, self.salt) < 0.12 && over < self.roof + 0.9;
            if over > self.roof && !chimney {
                return None;
            }
            let courses = 1.0 + 0.1 * noise(s * 1.5, y * 6.0, self.salt);
            return Some(scale(if over > self.roof { self.wall } else { self.roof_color }, courses));
        }
        // Texture costs the most here, so panes and doors do without.
        let wall = || {
            let (coarse, fine) = (noise(s * 0.35, y * 0.35, self.salt), noise(s * 4.0, y * 9.0, self.salt ^ 1));
            let dirt = if y < 0.5 { 0.85 } else { 1.0 };
            scale(self.wall, (1.0 + self.grain * (0.6 * fine + 0.8 * coarse)) * dirt)
        };
        if self.height - y < 0.3 {
            return Some(mix(wall(), self.trim, 0.7));
        }
        let (storey, bay) = (floor(y / self.storey), floor(s / self.bay));
        let (fx, fy) = (s / self.bay - bay as f32, y / self.storey - storey as f32);
        if let (Some(band), 0) = (self.shop, storey) {
            return Some(match fy {
                fy if fy > 0.78 => band,
                fy if fy > 0.12 && (0.06..0.94).contains(&fx) => {
                    let goods = noise(s * 2.5, y * 2.5, self.salt ^ 9);
                    scale(self.glass, 0.65 + 0.45 * goods.max(-0.3))
                }
                _ => scale(band, 0.6),
            });
        }
        let [w, h] = self.window;
        let (ax, ay) = ((fx - 0.5).abs() / (w * 0.5), (fy - 0.52).abs() / (h * 0.5));
        if storey == 0 && hash_unit(bay, 5, self.salt) < 0.3 {
            // A door instead of a window.
            let door = (fx - 0.5).abs() * self.bay < 0.5 && y < 2.2;
            return Some(if door { scale(self.trim, 0.55) } else { wall() });
        }
        if ax < 1.0 && ay < 1.0 {
            if ax > 0.86 || ay > 0.9 || (fx - 0.5).abs() * self.bay < 0.05 {
                return Some(self.trim);
            }
            let pane = hash_unit(bay, storey, self.salt ^ 2);
            return Some(scale(self.glass, 0.55 + 0.6 * pane + 0.25 * (fy - 0.5)));
        }
        if ax < 1.15 && ay >= 1.0 && fy < 0.52 && (fy - 0.52).abs() < h * 0.5 + 0.05 {
            return Some(mix(wall(), self.trim, 0.5));
        }
        Some(wall())
    }

    /// Paints the wall along the street, then the nearer one that faces the camera.
    pub(super) fn paint(&self, canvas: &mut Canvas, view: &View, light: &Light) {
        let top = self.height + self.roof + 0.9;
        let toward = -self.x[0].signum();
        let lit = light.on([toward, 0.0, 0.0], 1.0);
        canvas.along(view, self.x[0], self.z, [0.0, top], |z, y| {
            self.facade(z + self.z[0], y).and_then(|c| Paint::solid(times(c, lit), ids::BUILDING))
        });
        if self.z[0] > 1.5 {
            let lit = light.on([0.0, 0.0, -1.0], 1.0);
            let x = if self.x[0] < self.x[1] { self.x } else { [self.x[1], self.x[0]] };
            let (middle, half) = ((x[0] + x[1]) * 0.5, (x[1] - x[0]) * 0.5);
            canvas.facing(view, x, [0.0, top], self.z[0], |x, y| {
                // A gable: the roof narrows toward its ridge.
                if y > self.height && (x - middle).abs() / half > 1.0 - (y - self.height) / (self.roof + 0.9) {
                    return None;
                }
                self.facade(x + 40.0, y).and_then(|c| Paint::solid(times(c, lit), ids::BUILDING))
            });
        }
    }
}
