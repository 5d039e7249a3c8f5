//! A whole scene: laid out from one stream of draws, and painted: buildings from near to far, the rest behind them, then everything else from far to near.

use super::backdrop::{self, Sky};
use super::canvas::{Canvas, Color, OVERSAMPLE, Sensor, View, mix};
use super::cast;
use super::furniture::{Barrier, Bin, Pole, Sign, Tree};
use super::light::Light;
use super::noise::Dice;
use super::people::{Cyclist, Pedestrian};
use super::town::Town;
use super::vehicle::Vehicle;
use super::weather::{self, Tones};
use crate::classes::VOID;
use crate::sample::{LabelMap, RgbImage};

/// Whatever stands or moves in a street.
pub(super) enum Thing {
    Vehicle(Vehicle),
    Pedestrian(Pedestrian),
    Cyclist(Cyclist),
    Tree(Tree),
    Pole(Pole),
    Sign(Sign),
    Barrier(Barrier),
    Bin(Bin),
}

/// A thing at lateral place and depth.
pub(super) struct Placed {
    pub(super) at: [f32; 2],
    pub(super) thing: Thing,
}

/// The bonnet of the car the camera rides in: void.
struct Bonnet {
    /// Height of the visible strip in the middle and its fall to the sides, as shares of the picture.
    rise: f32,
    fall: f32,
    color: Color,
}

/// Everything one picture shows.
pub(super) struct Scene {
    height: usize,
    width: usize,
    view: View,
    light: Light,
    sky: Sky,
    sensor: Sensor,
    town: Town,
    things: Vec<Placed>,
    bonnet: Option<Bonnet>,
}

impl Scene {
    /// Draws a scene for a picture of the given size; every choice comes from `dice`.
    pub(super) fn draw(dice: &mut Dice, height: usize, width: usize) -> Self {
        let (height, width) = (height * OVERSAMPLE, width * OVERSAMPLE);
        let (view, light, sky, sensor) = weather::draw(dice, height, width);
        let tones = Tones::draw(dice, mix(sky.zenith, view.haze, 0.6));
        let town = Town::draw(dice, &tones);
        let edges = [0.0, width as f32].map(|px| (px - view.camera.cx) / view.camera.focal);
        let mut things = cast::draw(dice, tones, &town, edges);
        things.sort_by(|a, b| b.at[1].total_cmp(&a.at[1]));
        let bonnet = dice.chance(0.45).then(|| {
            let tone = dice.uniform(0.08, 0.6);
            Bonnet {
                rise: dice.uniform(0.025, 0.08),
                fall: dice.uniform(0.0, 0.06),
                color: dice.near([tone; 3], 0.03, 0.05),
            }
        });
        Self { height, width, view, light, sky, sensor, town, things, bonnet }
    }

    /// Picture and labels.
    pub(super) fn paint(&self) -> (RgbImage, LabelMap) {
        let (view, light) = (&self.view, &self.light);
        let mut canvas = Canvas::new(self.height, self.width);
        canvas.behind = true;
        for building in &self.town.buildings {
            building.paint(&mut canvas, view, light);
        }
        canvas.behind = false;
        backdrop::paint(&mut canvas, view, light, &self.sky, &self.town.skylines, &self.town.street, &self.town.walls);
        for Placed { at, thing } in &self.things {
            match thing {
                Thing::Vehicle(t) => t.shadow(&mut canvas, view, light, *at),
                Thing::Pedestrian(t) => t.shadow(&mut canvas, view, light, *at),
                Thing::Cyclist(t) => t.shadow(&mut canvas, view, light, *at),
                Thing::Tree(t) => t.shadow(&mut canvas, view, light, *at),
                Thing::Pole(t) => t.shadow(&mut canvas, view, light, *at),
                Thing::Sign(t) => t.shadow(&mut canvas, view, light, *at),
                Thing::Barrier(t) => t.shadow(&mut canvas, view, light, *at),
                Thing::Bin(t) => t.shadow(&mut canvas, view, light, *at),
            }
        }
        for Placed { at, thing } in &self.things {
            match thing {
                Thing::Vehicle(t) => t.paint(&mut canvas, view, light, *at),
                Thing::Pedestrian(t) => t.paint(&mut canvas, view, light, *at),
                Thing::Cyclist(t) => t.paint(&mut canvas, view, light, *at),
                Thing::Tree(t) => t.paint(&mut canvas, view, light, *at),
                Thing::Pole(t) => t.paint(&mut canvas, view, light, *at),
                Thing::Sign(t) => t.paint(&mut canvas, view, light, *at),
                Thing::Barrier(t) => t.paint(&mut canvas, view, light, *at),
                Thing::Bin(t) => t.paint(&mut canvas, view, light, *at),
            }
        }
        if let Some(bonnet) = &self.bonnet {
            self.paint_bonnet(&mut canvas, bonnet);
        }
        canvas.develop(&self.sensor)
    }

    fn paint_bonnet(&self, canvas: &mut Canvas, bonnet: &Bonnet) {
        for column in 0..self.width {
            let across = (column as f32 + 0.5) / self.width as f32 * 2.0 - 1.0;
            let rise = (bonnet.rise - bonnet.fall * across * across) * self.height as f32;
            for row in (self.height as f32 - rise).max(0.0).ceil() as usize..self.height {
                let down = (row as f32 + 0.5 - (self.height as f32 - rise)) / rise.max(1.0);
                let sheen = mix(bonnet.color, self.view.haze, 0.45 * (1.0 - down).powi(2));
                let i = row * self.width + column;
                canvas.colors[i] = sheen;
                canvas.ids[i] = VOID;
            }
        }
    }
}
