//! Draws what a scene is seen through: camera, sun and sky, air, sensor; and the tones that colours are drawn from.

use super::backdrop::Sky;
use super::canvas::{Camera, Color, Sensor, View, mix, scale};
use super::ids;
use super::light::Light;
use super::noise::Dice;

/// The scene's large colours. Cars, clothes, fences and signs often take one of them, so that colour alone tells no class.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tones {
    pub(super) asphalt: Color,
    pub(super) flags: Color,
    pub(super) wall: Color,
    pub(super) leaf: Color,
    pub(super) sky: Color,
}

impl Tones {
    pub(super) fn draw(dice: &mut Dice, sky: Color) -> Self {
        let grey = dice.uniform(0.2, 0.5);
        let asphalt = dice.near([grey, grey, grey * 1.02], 0.02, 0.02);
        // Pavement like the road, lighter, darker, or reddish.
        let flags = match dice.count(0, 3) {
            0 => dice.near(asphalt, 0.03, 0.02),
            1 => dice.near(scale(asphalt, 1.4), 0.06, 0.02),
            2 => dice.near(scale(asphalt, 0.72), 0.03, 0.02),
            _ => dice.near([grey * 1.2, grey * 1.0, grey * 0.85], 0.05, 0.02),
        };
        let flags = dice.habit(flags, ids::PAVEMENT);
        let wall = wall_color(dice);
        let leaf = leaf_color(dice);
        let leaf = dice.habit(leaf, ids::TREE);
        Self { asphalt, flags, wall, leaf, sky }
    }

    /// One of the scene's tones, a little changed.
    pub(super) fn any(&self, dice: &mut Dice) -> Color {
        let tone = dice.pick(&[self.asphalt, self.flags, self.wall, self.leaf, self.sky]);
        dice.near(tone, 0.08, 0.03)
    }
}

pub(super) fn wall_color(dice: &mut Dice) -> Color {
    let base = dice.pick(&[
        [0.5, 0.27, 0.2],
        [0.62, 0.5, 0.36],
        [0.7, 0.66, 0.56],
        [0.5, 0.5, 0.5],
        [0.34, 0.33, 0.32],
        [0.82, 0.8, 0.77],
        [0.42, 0.36, 0.3],
        [0.55, 0.6, 0.66],
    ]);
    dice.near(base, 0.1, 0.03)
}

pub(super) fn leaf_color(dice: &mut Dice) -> Color {
    let base = dice.pick(&[
        [0.2, 0.32, 0.12],
        [0.16, 0.26, 0.13],
        [0.3, 0.38, 0.14],
        [0.42, 0.36, 0.13],
        [0.4, 0.26, 0.13],
        [0.25, 0.26, 0.18],
    ]);
    dice.near(base, 0.05, 0.03)
}

/// Camera, air, light, sky and sensor of a scene of the given canvas size.
pub(super) fn draw(dice: &mut Dice, height: usize, width: usize) -> (View, Light, Sky, Sensor) {
    let (h, w) = (height as f32, width as f32);
    let camera = Camera {
        focal: w * dice.uniform(0.72, 1.0),
        cx: w * dice.uniform(0.36, 0.64),
        horizon: h * dice.uniform(0.4, 0.54),
        roll: dice.uniform(-0.025, 0.025),
        eye: dice.uniform(1.35, 2.0),
        thin: 0.75 + 1.5 * (1.0 - dice.variety),
    };
    // 0 clear, 1 broken clouds, 2 overcast, 3 low sun.
    let weather = dice.count(0, 3);
    let (zenith, horizon, cloud, cover): (Color, Color, Color, [f32; 2]) = match weather {
        0 => ([0.3, 0.5, 0.85], [0.78, 0.86, 0.95], [0.95, 0.95, 0.97], [0.0, 0.3]),
        1 => ([0.35, 0.5, 0.75], [0.8, 0.85, 0.9], [0.85, 0.85, 0.87], [0.35, 0.75]),
        2 => ([0.6, 0.62, 0.66], [0.78, 0.79, 0.81], [0.66, 0.67, 0.7], [0.6, 1.0]),
        _ => ([0.4, 0.45, 0.62], [0.95, 0.78, 0.6], [0.8, 0.68, 0.62], [0.1, 0.6]),
    };
    let zenith = dice.near(zenith, 0.08, 0.03);
    let haze = dice.near(horizon, 0.06, 0.02);
    let elevation = if weather == 3 { dice.uniform(0.2, 0.45) } else { dice.uniform(0.4, 1.1) };
    let azimuth = dice.uniform(0.0, std::f32::consts::TAU);
    let to_sun = [elevation.cos() * azimuth.sin(), elevation.sin(), elevation.cos() * azimuth.cos()];
    let strength = match weather {
        0 => dice.uniform(0.55, 0.75),
        1 => dice.uniform(0.2, 0.65),
        2 => dice.uniform(0.0, 0.06),
        _ => dice.uniform(0.3, 0.6),
    };
    let warm: Color = if weather == 3 { [1.2, 0.95, 0.7] } else { [1.06, 1.0, 0.92] };
    let ambient = mix([0.95, 0.97, 1.02], scale(zenith, 1.5), 0.25);
    let light = Light {
        to_sun,
        ambient: scale(ambient, 1.15 - strength * 0.75),
        sun: scale(warm, strength * 1.5),
        sun_share: strength * 0.9,
    };
    let view = View { camera, haze, haze_distance: dice.uniform(1.0, 2.2).powi(2) * 70.0 };
    let sky =
        Sky { zenith, cloud: dice.near(cloud, 0.06, 0.01), cover: dice.uniform(cover[0], cover[1]), salt: dice.salt() };
    let exposure = dice.vary(0.85, 1.45);
    let temperature = dice.vary(-0.09, 0.09);
    let tint = dice.uniform(-0.03, 0.03);
    let sensor = Sensor {
        gain: [exposure * (1.0 + temperature), exposure * (1.0 + tint), exposure * (1.0 - temperature)],
        gamma: dice.vary(0.85, 1.35),
        noise: dice.uniform(0.006, 0.02) * dice.variety,
        blur: dice.uniform(0.0, 0.25) * dice.variety,
        vignette: dice.uniform(0.0, 0.35) * dice.variety,
        salt: dice.salt(),
    };
    (view, light, sky, sensor)
}
