//! What stands behind everything else: sky, far roofs and trees, and the ground with road and pavement.

use super::canvas::{Canvas, Color, View, mix, scale, times};
use super::ids;
use super::light::Light;
use super::noise::{cloud, floor, hash_unit, noise, phase};
use crate::classes::VOID;

/// Sky from horizon to zenith, with clouds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sky {
    pub(super) zenith: Color,
    pub(super) cloud: Color,
    /// Share of the sky that clouds take, 0 to 1.
    pub(super) cover: f32,
    pub(super) salt: u32,
}

/// A far row of roofs or tree tops.
#[derive(Clone, Copy, Debug)]
pub(super) struct Skyline {
    pub(super) id: u8,
    pub(super) color: Color,
    /// Mean height, as a tangent above the horizon.
    pub(super) height: f32,
    /// Depth it is hazed as, in metres.
    pub(super) depth: f32,
    pub(super) salt: u32,
}

/// What lies beyond the pavement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Beyond {
    Paved,
    Grass,
}

/// A painted line along the road.
#[derive(Clone, Copy, Debug)]
pub(super) struct LaneMark {
    pub(super) x: f32,
    pub(super) width: f32,
    /// Length of dash and of period, in metres; equal for an unbroken line.
    pub(super) dash: [f32; 2],
    pub(super) color: Color,
}

/// The ground: road, pavements and what lies beyond.
#[derive(Clone, Debug)]
pub(super) struct Street {
    /// Lateral places of the kerbs, left and right.
    pub(super) kerbs: [f32; 2],
    /// Widths of the pavements, left and right.
    pub(super) pavements: [f32; 2],
    pub(super) beyond: [Beyond; 2],
    /// The street's centre lies at `bend * z * z`.
    pub(super) bend: f32,
    /// Depths between which a crossing street runs.
    pub(super) crossing: Option<[f32; 2]>,
    /// Depths of a zebra crossing.
    pub(super) zebra: Option<[f32; 2]>,
    pub(super) marks: Vec<LaneMark>,
    /// Share of the paint that is worn off.
    pub(super) wear: f32,
    pub(super) asphalt: Color,
    pub(super) flags: Color,
    pub(super) kerbstone: Color,
    pub(super) grass: Color,
    /// Side of a flagstone, in metres.
    pub(super) flag_size: f32,
    pub(super) roughness: f32,
    pub(super) salt: u32,
}

impl Street {
    /// Class of a ground point and its colour under white light.
    fn surface(&self, x: f32, z: f32) -> (u8, Color) {
        let fade = 1.0 / (1.0 + z * 0.07);
        let grain = if z < 40.0 { noise(x * 9.0, z * 5.0, self.salt) * fade * self.roughness } else { 0.0 };
        let in_crossing = self.crossing.is_some_and(|[a, b]| (a..b).contains(&z));
        let side = usize::from(x > (self.kerbs[0] + self.kerbs[1]) * 0.5);
        let outside = if side == 0 { self.kerbs[0] - x } else { x - self.kerbs[1] };
        if outside < 0.0 || in_crossing {
            return (ids::ROAD, scale(self.road(x, z, outside, in_crossing), 1.0 + grain));
        }
        if outside < self.pavements[side] || self.beyond[side] == Beyond::Paved {
            if outside < 0.16 {
                return (ids::PAVEMENT, scale(self.kerbstone, 1.0 + grain));
            }
            let (i, j) = (floor(x / self.flag_size), floor(z / self.flag_size));
            let tone = 1.0 + 0.16 * (hash_unit(i, j, self.salt ^ 3) - 0.5) * fade.sqrt();
            let (a, b) = (x / self.flag_size - i as f32, z / self.flag_size - j as f32);
            let joint = if a.min(b) < 0.06 { 1.0 - 0.35 * fade } else { 1.0 };
            return (ids::PAVEMENT, scale(self.flags, tone * joint * (1.0 + grain)));
        }
        let tufts = cloud(x * 2.0, z * 1.2, self.salt ^ 5);
        (ids::TREE, scale(self.grass, 1.0 + 0.3 * tufts + grain))
    }

    fn road(&self, x: f32, z: f32, outside: f32, in_crossing: bool) -> Color {
        let stains = noise(x * 0.45, z * 0.22, self.salt ^ 11);
        let patch = hash_unit(floor(x / 2.7), floor(z / 7.0), self.salt ^ 13);
        let patched = if patch < 0.14 {
            0.84
        } else if patch > 0.9 {
            1.13
        } else {
            1.0
        };
        // Wheels polish two tracks in each lane; dirt gathers along the kerb.
        let track = 0.93 + 0.28 * (phase(x, 1.7) - 0.5).abs();
        let gutter = if outside > -0.35 && !in_crossing { 0.8 } else { 1.0 };
        let crack = if z < 25.0 && noise(x * 0.8, z * 0.5, self.salt ^ 17).abs() < 0.015 { 0.75 } else { 1.0 };
        let bare = scale(self.asphalt, (1.0 + 0.14 * stains) * patched * track * gutter * crack);
        if in_crossing {
            return bare;
        }
        let worn = || noise(x * 3.0, z * 1.1, self.salt ^ 19) * 0.5 + 0.5 < self.wear;
        if self.zebra.is_some_and(|[a, b]| (a..b).contains(&z)) && floor(x / 0.55) % 2 == 0 && !worn() {
            return mix(bare, [0.85, 0.85, 0.82], 0.8);
        }
        for mark in &self.marks {
            if (x - mark.x).abs() < mark.width * 0.5 && phase(z, mark.dash[1]) * mark.dash[1] <= mark.dash[0] && !worn()
            {
                return mix(bare, mark.color, 0.85);
            }
        }
        bare
    }
}

/// Heights of the walls along each side by whole metres of depth, for the shadows they throw on the ground.
pub(super) struct WallHeights {
    pub(super) lines: [f32; 2],
    pub(super) heights: [Vec<f32>; 2],
}

impl WallHeights {
    /// Whether a wall stands between a ground point and the sun.
    fn shades(&self, light: &Light, x: f32, z: f32) -> bool {
        let [sun_x, sun_y, sun_z] = light.to_sun;
        if sun_x.abs() < 0.05 {
            return false;
        }
        let side = usize::from(sun_x > 0.0);
        let way = (self.lines[side] - x) / sun_x;
        let at = z + way * sun_z;
        way > 0.0 && at >= 0.0 && self.heights[side].get(at as usize).is_some_and(|h| way * sun_y < *h)
    }
}

/// Paints sky, skylines and ground wherever the canvas is blank.
pub(super) fn paint(
    canvas: &mut Canvas,
    view: &View,
    light: &Light,
    sky: &Sky,
    skylines: &[Skyline],
    street: &Street,
    walls: &WallHeights,
) {
    let camera = view.camera;
    let open = light.on([0.0, 1.0, 0.0], 1.0);
    let shaded = light.on([0.0, 1.0, 0.0], 0.0);
    let tops: Vec<Vec<f32>> = (0..canvas.width)
        .map(|column| skylines.iter().map(|s| skyline_top(s, camera.ray(column as f32 + 0.5, 0.0).0)).collect())
        .collect();
    let lit_far = light.on([0.0, 0.3, -0.95], 1.0);
    for row in 0..canvas.height {
        for column in 0..canvas.width {
            let i = row * canvas.width + column;
            if canvas.ids[i] != VOID {
                continue;
            }
            let (u, v) = camera.ray(column as f32 + 0.5, row as f32 + 0.5);
            if v > 0.004 {
                let z = camera.eye / v;
                let x = u * z;
                let (id, color) = street.surface(x - street.bend * z * z, z);
                let lit = if light.sun_share > 0.05 && walls.shades(light, x, z) { shaded } else { open };
                canvas.colors[i] = view.through_air(times(color, lit), z);
                canvas.ids[i] = id;
            } else if let Some(k) = (0..skylines.len()).find(|k| -v < tops[column][*k]) {
                let line = &skylines[k];
                let texture = noise(u * 130.0, v * 130.0, line.salt) * if line.id == ids::TREE { 0.3 } else { 0.12 };
                canvas.colors[i] = view.through_air(times(scale(line.color, 1.0 + texture), lit_far), line.depth);
                canvas.ids[i] = line.id;
            } else {
                canvas.colors[i] = sky_color(sky, view, u, -v);
                canvas.ids[i] = ids::SKY;
            }
        }
    }
}

fn sky_color(sky: &Sky, view: &View, u: f32, up: f32) -> Color {
    let up = up.max(0.0);
    let clear = mix(view.haze, sky.zenith, (up * 1.7).min(1.0).sqrt());
    if sky.cover <= 0.0 {
        return clear;
    }
    let flat = 1.0 / (up + 0.18);
    let density = cloud(u * flat * 1.3, flat * 1.6, sky.salt) * 0.5 + 0.5;
    let share = ((density - (1.0 - sky.cover)) * 3.0).clamp(0.0, 1.0);
    mix(clear, scale(sky.cloud, 0.82 + 0.3 * density), share * 0.9)
}

fn skyline_top(line: &Skyline, u: f32) -> f32 {
    if line.id == ids::BUILDING {
        line.height * (0.5 + hash_unit(floor(u * 14.0), 0, line.salt))
    } else {
        line.height * (1.0 + 0.5 * cloud(u * 7.0, 0.5, line.salt) + 0.25 * noise(u * 60.0, 0.5, line.salt))
    }
}
