//! The camera, and the picture at twice the resolution that surfaces are painted on from far to near.
//!
//! World coordinates in metres: x to the right, y up from the ground, z away from the camera, which stands at
//! (0, eye, 0). Surfaces are upright: facing the camera (z fixed) or facing the street (x fixed).

use super::ids;
use super::noise::hash;
use crate::classes::VOID;
use crate::sample::{LabelMap, RgbImage};

/// Samples a pixel, along each axis.
pub(super) const OVERSAMPLE: usize = 2;

/// Classes the ground is painted in.
const GROUND: [u8; 3] = [ids::ROAD, ids::PAVEMENT, ids::TREE];

pub(super) type Color = [f32; 3];

pub(super) fn scale(color: Color, by: f32) -> Color {
    color.map(|v| v * by)
}

pub(super) fn times(a: Color, b: Color) -> Color {
    [a[0] * b[0], a[1] * b[1], a[2] * b[2]]
}

pub(super) fn mix(a: Color, b: Color, t: f32) -> Color {
    [a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t]
}

/// A pinhole camera, in canvas pixels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Camera {
    pub(super) focal: f32,
    /// Column of the vanishing point.
    pub(super) cx: f32,
    /// Row of the horizon at `cx`.
    pub(super) horizon: f32,
    /// Rows the horizon falls a column: a small roll, as a shear.
    pub(super) roll: f32,
    /// Height above the ground, in metres.
    pub(super) eye: f32,
    /// Least half-width a thin thing is drawn with, in samples.
    pub(super) thin: f32,
}

impl Camera {
    pub(super) fn column(&self, x: f32, z: f32) -> f32 {
        self.cx + self.focal * x / z
    }

    /// Row of height `y` at depth `z`, at the column `px`.
    pub(super) fn row(&self, y: f32, z: f32, px: f32) -> f32 {
        self.horizon + self.roll * (px - self.cx) + self.focal * (self.eye - y) / z
    }

    /// Tangents of a canvas point, to the right and downward.
    pub(super) fn ray(&self, px: f32, py: f32) -> (f32, f32) {
        ((px - self.cx) / self.focal, (py - self.horizon - self.roll * (px - self.cx)) / self.focal)
    }
}

/// Camera and air.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub(super) camera: Camera,
    pub(super) haze: Color,
    /// Distance over which haze takes about 63 %, in metres.
    pub(super) haze_distance: f32,
}

impl View {
    /// Share of haze in what is seen at depth `z`: `1 - exp(-z / haze_distance)` with the exponential's series to the
    /// third power, which serves as well and costs no library call.
    pub(super) fn air(&self, z: f32) -> f32 {
        let t = z / self.haze_distance;
        1.0 - 1.0 / (1.0 + t * (1.0 + t * (0.5 + t * (1.0 / 6.0))))
    }

    pub(super) fn through_air(&self, color: Color, z: f32) -> Color {
        mix(color, self.haze, self.air(z))
    }
}

/// What a surface shows at a point.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paint {
    pub(super) color: Color,
    pub(super) id: u8,
    /// 1 hides what is behind; less lets it shine through, the label is the surface's all the same.
    pub(super) cover: f32,
}

impl Paint {
    pub(super) fn solid(color: Color, id: u8) -> Option<Self> {
        Some(Self { color, id, cover: 1.0 })
    }
}

/// Columns or rows whose centres lie in `[low, high)`, cut to `0..n`.
fn span(low: f32, high: f32, n: usize) -> std::ops::Range<usize> {
    let cut = |v: f32| (v - 0.5).ceil().clamp(0.0, n as f32) as usize;
    cut(low)..cut(high).max(cut(low))
}

/// Colours and ids of a picture in the making.
pub(super) struct Canvas {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) colors: Vec<Color>,
    pub(super) ids: Vec<u8>,
    /// While set, surfaces are painted where nothing is yet: for what is painted from near to far.
    pub(super) behind: bool,
}

impl Canvas {
    pub(super) fn new(height: usize, width: usize) -> Self {
        let n = height * width;
        Self { width, height, colors: vec![[0.0; 3]; n], ids: vec![VOID; n], behind: false }
    }

    fn put(&mut self, i: usize, paint: Paint, haze: Color, air: f32) {
        let color = mix(paint.color, haze, air);
        self.colors[i] = if paint.cover < 1.0 { mix(self.colors[i], color, paint.cover) } else { color };
        self.ids[i] = paint.id;
    }

    /// Paints the upright rectangle `x` by `y` at depth `z`, facing the camera; `shade` gets (x, y) in metres.
    pub(super) fn facing(
        &mut self,
        view: &View,
        x: [f32; 2],
        y: [f32; 2],
        z: f32,
        shade: impl Fn(f32, f32) -> Option<Paint>,
    ) {
        let camera = view.camera;
        let columns = span(camera.column(x[0], z), camera.column(x[1], z), self.width);
        let air = view.air(z);
        let metre = z / camera.focal;
        for column in columns {
            let px = column as f32 + 0.5;
            let world_x = (px - camera.cx) * metre;
            let base = camera.row(0.0, z, px);
            for row in span(base - y[1] / metre, base - y[0] / metre, self.height) {
                let i = row * self.width + column;
                if self.behind && self.ids[i] != VOID {
                    continue;
                }
                let Some(paint) = shade(world_x, (base - row as f32 - 0.5) * metre) else { continue };
                self.put(i, paint, view.haze, air);
            }
        }
    }

    /// Paints the upright rectangle `z` by `y` at lateral place `x`, seen from the street; `shade` gets (z, y) in metres.
    pub(super) fn along(
        &mut self,
        view: &View,
        x: f32,
        z: [f32; 2],
        y: [f32; 2],
        shade: impl Fn(f32, f32) -> Option<Paint>,
    ) {
        const NEAREST: f32 = 0.6;
        let camera = view.camera;
        let z = [z[0].max(NEAREST), z[1].max(NEAREST)];
        let (a, b) = (camera.column(x, z[0]), camera.column(x, z[1]));
        for column in span(a.min(b), a.max(b), self.width) {
            let px = column as f32 + 0.5;
            let depth = camera.focal * x / (px - camera.cx);
            let metre = depth / camera.focal;
            let base = camera.row(0.0, depth, px);
            let air = view.air(depth);
            for row in span(base - y[1] / metre, base - y[0] / metre, self.height) {
                let i = row * self.width + column;
                if self.behind && self.ids[i] != VOID {
                    continue;
                }
                let Some(paint) = shade(depth, (base - row as f32 - 0.5) * metre) else { continue };
                self.put(i, paint, view.haze, air);
            }
        }
    }

    /// Darkens the ground inside the convex quadrilateral of (x, z) corners, given in turning order.
    pub(super) fn shade_ground(&mut self, view: &View, corners: [[f32; 2]; 4], by: f32) {
        let camera = view.camera;
        let corners = corners.map(|[x, z]| [x, z.max(0.8)]);
        let columns = corners.map(|[x, z]| camera.column(x, z));
        let low = columns.iter().copied().fold(f32::MAX, f32::min);
        let high = columns.iter().copied().fold(f32::MIN, f32::max);
        let near = corners.iter().map(|c| c[1]).fold(f32::MAX, f32::min);
        let far = corners.iter().map(|c| c[1]).fold(f32::MIN, f32::max);
        let area: f32 = (0..4).map(|i| cross(corners[i], corners[(i + 1) % 4], [0.0, 0.0])).sum();
        let turn = area.signum();
        for column in span(low, high, self.width) {
            let px = column as f32 + 0.5;
            for row in span(camera.row(0.0, far, px), camera.row(0.0, near, px), self.height) {
                let i = row * self.width + column;
                if !GROUND.contains(&self.ids[i]) {
                    continue;
                }
                let (u, v) = camera.ray(px, row as f32 + 0.5);
                let z = camera.eye / v.max(1e-4);
                let point = [u * z, z];
                if (0..4).all(|i| cross(corners[i], corners[(i + 1) % 4], point) * turn >= 0.0) {
                    self.colors[i] = scale(self.colors[i], by);
                }
            }
        }
    }
}

fn cross(a: [f32; 2], b: [f32; 2], p: [f32; 2]) -> f32 {
    (b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0])
}

/// What the sensor makes of the light.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sensor {
    /// Gain of each channel: exposure and colour temperature.
    pub(super) gain: Color,
    /// Exponent of the tone curve.
    pub(super) gamma: f32,
    /// Standard deviation of the noise, in parts of full scale.
    pub(super) noise: f32,
    /// Share of a pixel that its four neighbours take.
    pub(super) blur: f32,
    /// Loss of light in the corners.
    pub(super) vignette: f32,
    pub(super) salt: u32,
}

/// Which id a pixel takes when its samples disagree and tie: thin and small things first, then near before far.
const TIE_ORDER: [u8; 12] = [
    ids::POLE,
    ids::SIGN,
    ids::BICYCLIST,
    ids::PEDESTRIAN,
    ids::FENCE,
    ids::CAR,
    VOID,
    ids::TREE,
    ids::PAVEMENT,
    ids::BUILDING,
    ids::ROAD,
    ids::SKY,
];

fn vote(ids: [u8; 4]) -> u8 {
    if ids == [ids[0]; 4] {
        return ids[0];
    }
    let key = |id: u8| {
        let votes = ids.iter().filter(|other| **other == id).count();
        (votes, std::cmp::Reverse(TIE_ORDER.iter().position(|t| *t == id)))
    };
    ids.into_iter().max_by_key(|id| key(*id)).unwrap_or(VOID)
}

impl Canvas {
    /// Picture and labels at the final resolution: colours averaged, ids by vote of the pixel's samples.
    pub(super) fn develop(&self, sensor: &Sensor) -> (RgbImage, LabelMap) {
        let (height, width) = (self.height / OVERSAMPLE, self.width / OVERSAMPLE);
        let mut light = Vec::with_capacity(height * width);
        let mut ids = Vec::with_capacity(height * width);
        for y in 0..height {
            for x in 0..width {
                let i = y * OVERSAMPLE * self.width + x * OVERSAMPLE;
                let quad = [i, i + 1, i + self.width, i + self.width + 1];
                ids.push(vote(quad.map(|i| self.ids[i])));
                let sum = quad.iter().fold([0f32; 3], |s, i| {
                    let c = self.colors[*i];
                    [s[0] + c[0], s[1] + c[1], s[2] + c[2]]
                });
                light.push(scale(sum, 0.25));
            }
        }
        let mut rgb = Vec::with_capacity(height * width * 3);
        let curve: Vec<f32> = (0..=1024).map(|i| (i as f32 / 1024.0).powf(sensor.gamma)).collect();
        for y in 0..height {
            for x in 0..width {
                let at = |y: usize, x: usize| light[y * width + x];
                let around = [
                    at(y.saturating_sub(1), x),
                    at((y + 1).min(height - 1), x),
                    at(y, x.saturating_sub(1)),
                    at(y, (x + 1).min(width - 1)),
                ];
                let (ny, nx) = (y as f32 / height as f32 - 0.5, x as f32 / width as f32 - 0.5);
                let fall = 1.0 - sensor.vignette * 2.0 * (nx * nx + ny * ny);
                for c in 0..3 {
                    let neighbours: f32 = around.iter().map(|p| p[c]).sum();
                    let v = at(y, x)[c] * (1.0 - sensor.blur) + neighbours * (0.25 * sensor.blur);
                    let v = (v * sensor.gain[c] * fall).clamp(0.0, 1.0);
                    let toned = curve[(v * 1024.0) as usize];
                    // Four bytes of a hash sum to nearly a normal value; light adds shot noise.
                    let bytes = hash(x as i32, y as i32, sensor.salt.wrapping_add(c as u32)).to_le_bytes();
                    let normal = (bytes.iter().map(|b| f32::from(*b)).sum::<f32>() - 510.0) / 147.8;
                    let grain = sensor.noise * (0.6 + 0.8 * toned.sqrt()) * normal;
                    rgb.push(((toned + grain).clamp(0.0, 1.0) * 255.0 + 0.5) as u8);
                }
            }
        }
        (RgbImage { height, width, rgb }, LabelMap { height, width, ids })
    }
}
