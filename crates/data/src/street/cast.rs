//! Draws who and what is in a street: vehicles, barriers, trees, furniture and people, each where it can be seen.

use super::canvas::{Color, mix, scale};
use super::furniture::{Barrier, BarrierKind, Bin, Pole, PoleHead, Sign, SignShape, Tree};
use super::ids;
use super::noise::Dice;
use super::people::{Clothes, Cyclist, Pedestrian};
use super::scene::{Placed, Thing};
use super::town::{Side, Town};
use super::vehicle::{Heading, Vehicle};
use super::weather::{Tones, leaf_color};

/// Farthest depth anything movable stands at, in metres.
const FAR: f32 = 45.0;

/// Everything that stands or moves in `town`; `edges` are the tangents of the picture's left and right border.
pub(super) fn draw(dice: &mut Dice, tones: Tones, town: &Town, edges: [f32; 2]) -> Vec<Placed> {
    let mut placer = Placer { dice, tones, town, edges, things: Vec::new() };
    placer.vehicles();
    for side in [0, 1] {
        placer.barriers(side);
        placer.trees(side);
    }
    placer.furniture();
    placer.people();
    placer.things
}

struct Placer<'a> {
    dice: &'a mut Dice,
    tones: Tones,
    town: &'a Town,
    /// Tangents of the picture's left and right border.
    edges: [f32; 2],
    things: Vec<Placed>,
}

impl Placer<'_> {
    fn put(&mut self, x: f32, z: f32, thing: Thing) {
        let x = x + self.town.street.bend * z * z;
        self.things.push(Placed { at: [x, z], thing });
    }

    /// Sign of a side: -1 left, 1 right.
    fn sign(side: usize) -> f32 {
        if side == 0 { -1.0 } else { 1.0 }
    }

    /// Least depth at which the lateral place `x` is inside the picture.
    fn nearest(&self, x: f32) -> f32 {
        let edge = self.edges[usize::from(x > 0.0)];
        (x / edge).abs() * 1.08
    }

    /// A depth for something at `x`: from where it comes into view, the nearer the likelier.
    fn depth(&mut self, x: f32, least: f32, spread: f32) -> f32 {
        let near = self.nearest(x).max(least);
        (near * self.dice.uniform(0.0, spread.ln() * (0.4 + 0.6 * self.dice.variety)).exp()).min(FAR)
    }

    /// A place on the pavement of `side`: `t` 0 at the kerb, 1 at the far edge.
    fn on_pavement(&mut self, side: usize, t: [f32; 2]) -> f32 {
        let street = &self.town.street;
        let share = self.dice.uniform(t[0], t[1]);
        street.kerbs[side] + Self::sign(side) * street.pavements[side] * share
    }

    fn in_crossing(&self, z: f32) -> bool {
        self.town.street.crossing.is_some_and(|[a, b]| z > a - 0.5 && z < b + 0.5)
    }

    fn vehicles(&mut self) {
        let kerbs = self.town.street.kerbs;
        let middle = (kerbs[0] + kerbs[1]) * 0.5;
        for side in [0, 1] {
            let sign = Self::sign(side);
            if !self.dice.chance(0.6) {
                continue;
            }
            // A row parked along the kerb.
            let mut z = self.nearest(kerbs[side]).max(5.0) + self.dice.uniform(-2.0, 10.0);
            for _ in 0..self.dice.count(1, 4) {
                let heading = if self.dice.chance(0.75) == (side == 1) { Heading::Away } else { Heading::Toward };
                let vehicle = self.vehicle(heading);
                let x = kerbs[side] - sign * (vehicle.width * 0.5 + self.dice.uniform(0.05, 0.35));
                let length = vehicle.length;
                if !self.in_crossing(z) && !self.in_crossing(z + length) && z < FAR {
                    self.put(x, z, Thing::Vehicle(vehicle));
                }
                z += length + self.dice.uniform(0.8, 7.0);
            }
        }
        if self.dice.chance(0.5) {
            let vehicle = self.vehicle(Heading::Away);
            let x = (middle.max(-1.0) + kerbs[1]) * 0.5 + self.dice.uniform(-0.4, 0.4);
            let z = self.dice.uniform(9.0, 35.0);
            self.put(x, z, Thing::Vehicle(vehicle));
        }
        if self.dice.chance(0.5) {
            let vehicle = self.vehicle(Heading::Toward);
            let x = (middle + kerbs[0]) * 0.5 + self.dice.uniform(-0.4, 0.4);
            let z = self.depth(x, 7.0, 3.0);
            self.put(x, z, Thing::Vehicle(vehicle));
        }
        if let Some([a, b]) = self.town.street.crossing
            && self.dice.chance(0.6)
        {
            let vehicle = self.vehicle(Heading::Across);
            let z = self.dice.uniform(a + 0.8, b - 2.0);
            let reach = self.edges.map(|e| e * z);
            let x = self.dice.uniform(reach[0], reach[1]);
            self.put(x, z, Thing::Vehicle(vehicle));
        }
    }

    fn vehicle(&mut self, heading: Heading) -> Vehicle {
        let color = if self.dice.disguise(0.2) {
            self.tones.any(self.dice)
        } else {
            let base = self.dice.pick(&[
                [0.06, 0.06, 0.07],
                [0.35, 0.36, 0.38],
                [0.62, 0.63, 0.65],
                [0.85, 0.85, 0.86],
                [0.5, 0.08, 0.07],
                [0.1, 0.16, 0.36],
                [0.1, 0.25, 0.18],
                [0.45, 0.42, 0.34],
            ]);
            self.dice.near(base, 0.05, 0.03)
        };
        let color = self.dice.habit(color, ids::CAR);
        let glass = mix([0.12, 0.14, 0.16], self.tones.sky, self.dice.uniform(0.05, 0.6));
        // Hatchback, saloon, van, bus.
        let kind = self.dice.pick(&[0, 0, 0, 1, 1, 1, 2, 3]);
        let (width, height, length, belt, ends) = match kind {
            0 => (1.7, 1.48, 3.9, 0.58, [0.25, 0.0]),
            1 => (1.78, 1.44, 4.5, 0.6, [0.26, 0.14]),
            2 => (1.95, self.dice.uniform(1.9, 2.5), 5.0, 0.52, [0.1, 0.0]),
            _ => (2.5, 3.1, 10.0, 0.42, [0.0, 0.0]),
        };
        Vehicle {
            heading,
            width,
            height: height * self.dice.uniform(0.95, 1.06),
            length,
            belt,
            ends,
            color,
            glass,
            lamps_on: self.dice.chance(0.35),
            salt: self.dice.salt(),
        }
    }

    fn barriers(&mut self, side: usize) {
        let sign = Self::sign(side);
        let street = &self.town.street;
        let edge = street.kerbs[side] + sign * (street.pavements[side] + 0.05);
        let kerb = street.kerbs[side] + sign * 0.25;
        let set_back = self.town.sides[side] != Side::Terrace;
        if set_back && self.dice.chance(0.9) {
            let kind = self.dice.pick(&[
                BarrierKind::Railing,
                BarrierKind::Railing,
                BarrierKind::Railing,
                BarrierKind::Planks,
                BarrierKind::Planks,
                BarrierKind::Planks,
                BarrierKind::Hedge,
                BarrierKind::Wall,
            ]);
            self.barrier_run(kind, edge, 9);
        }
        // Guard rails at the kerb, before walls too.
        if self.dice.chance(if set_back { 0.15 } else { 0.55 }) {
            self.barrier_run(BarrierKind::Railing, kerb, 5);
        }
    }

    /// Panels in a row along the street, from where the line comes into view.
    fn barrier_run(&mut self, kind: BarrierKind, x: f32, n_most: i64) {
        const PANEL: f32 = 2.4;
        let height = match kind {
            BarrierKind::Railing => self.dice.uniform(0.95, 1.35),
            BarrierKind::Planks => self.dice.uniform(1.1, 1.9),
            BarrierKind::Hedge => self.dice.uniform(0.9, 2.0),
            BarrierKind::Wall => self.dice.uniform(0.6, 1.3),
        };
        let color = match kind {
            BarrierKind::Hedge => self.dice.near(self.tones.leaf, 0.06, 0.02),
            BarrierKind::Wall if self.dice.chance(0.5) => self.dice.near(self.tones.wall, 0.06, 0.02),
            _ if self.dice.disguise(0.3) => self.tones.any(self.dice),
            _ => {
                let base = self.dice.pick(&[
                    [0.1, 0.12, 0.12],
                    [0.55, 0.56, 0.57],
                    [0.4, 0.29, 0.19],
                    [0.16, 0.27, 0.2],
                    [0.8, 0.79, 0.75],
                ]);
                self.dice.near(base, 0.06, 0.02)
            }
        };
        let color = match kind {
            BarrierKind::Railing | BarrierKind::Planks => self.dice.habit(color, ids::FENCE),
            BarrierKind::Hedge | BarrierKind::Wall => color,
        };
        let salt = self.dice.salt();
        let mut z = self.nearest(x) * self.dice.uniform(0.55, 1.3);
        for _ in 0..self.dice.count(3, n_most.max(3)) {
            let barrier = Barrier { kind, length: PANEL, height, across: false, color, salt };
            if !self.in_crossing(z) && !self.in_crossing(z + PANEL) && z < FAR {
                self.put(x, z, Thing::Barrier(barrier));
            }
            z += PANEL;
        }
    }

    fn trees(&mut self, side: usize) {
        let sign = Self::sign(side);
        let n = match self.town.sides[side] {
            Side::Terrace => self.dice.count(-1, 2),
            Side::Houses => self.dice.count(1, 4),
            Side::Park => self.dice.count(3, 7),
        };
        for _ in 0..n.max(0) {
            let x = if self.town.sides[side] == Side::Terrace {
                self.on_pavement(side, [0.2, 0.45])
            } else {
                self.on_pavement(side, [1.3, 1.5]) + sign * self.dice.uniform(0.0, 9.0)
            };
            let z = self.depth(x, 7.0, 4.5);
            let tree = self.tree();
            if !self.in_crossing(z) {
                self.put(x, z, Thing::Tree(tree));
            }
        }
    }

    fn tree(&mut self) -> Tree {
        let size = self.dice.uniform(0.7, 1.5);
        let trunk_height = size * self.dice.uniform(1.8, 3.0);
        let spread = size * self.dice.uniform(0.9, 1.7);
        let clumps = (0..self.dice.count(3, 6))
            .map(|_| {
                let (x, y) = (self.dice.uniform(-1.0, 1.0) * spread, self.dice.uniform(0.0, 2.2) * size);
                [x, trunk_height + y + 0.4, size * self.dice.uniform(0.8, 1.4)]
            })
            .collect();
        let leaf =
            if self.dice.chance(0.5) { self.dice.near(self.tones.leaf, 0.05, 0.02) } else { leaf_color(self.dice) };
        Tree {
            trunk: [size * self.dice.uniform(0.1, 0.2), trunk_height + 0.8 * size],
            bark: self.dice.near([0.27, 0.22, 0.17], 0.07, 0.02),
            leaf,
            clumps,
            bare: self.dice.chance(0.15),
            salt: self.dice.salt(),
        }
    }

    fn furniture(&mut self) {
        let lamp_color = self.metal();
        let lamp_height = self.dice.uniform(4.0, 8.5);
        for _ in 0..self.dice.count(2, 5) {
            let side = usize::from(self.dice.chance(0.5));
            let x = self.on_pavement(side, [0.06, 0.25]);
            let z = self.depth(x, 5.5, 2.2);
            let arm = -Self::sign(side) * self.dice.uniform(0.8, 2.0);
            let pole = match self.dice.count(0, 4) {
                0..=2 => {
                    let head = self.dice.pick(&[PoleHead::Arm(arm), PoleHead::Arm(arm), PoleHead::Ball]);
                    let width = self.dice.uniform(0.2, 0.38);
                    Pole { height: lamp_height, width, head, color: lamp_color }
                }
                3 => {
                    let (height, width) = (self.dice.uniform(3.0, 9.0), self.dice.uniform(0.24, 0.42));
                    Pole { height, width, head: PoleHead::None, color: self.metal() }
                }
                _ => Pole { height: 1.1, width: 0.3, head: PoleHead::None, color: self.metal() },
            };
            self.put(x, z, Thing::Pole(pole));
        }
        for _ in 0..self.dice.count(2, 5) {
            let side = usize::from(self.dice.chance(0.5));
            let x = self.on_pavement(side, [0.05, 0.4]);
            let z = self.depth(x, 5.5, 1.8);
            let sign = self.sign_post();
            self.put(x, z, Thing::Sign(sign));
        }
        for _ in 0..self.dice.count(-1, 2).max(0) {
            let side = usize::from(self.dice.chance(0.5));
            let x = self.on_pavement(side, [0.15, 0.95]);
            let z = self.depth(x, 5.0, 3.0);
            let size = [self.dice.uniform(0.5, 1.0), self.dice.uniform(0.8, 1.5)];
            let color = if self.dice.chance(0.5) {
                self.tones.any(self.dice)
            } else {
                self.dice.near([0.3, 0.3, 0.3], 0.25, 0.15)
            };
            self.put(x, z, Thing::Bin(Bin { size, color }));
        }
    }

    fn metal(&mut self) -> Color {
        let base = self.dice.pick(&[
            [0.1, 0.1, 0.1],
            [0.5, 0.51, 0.52],
            [0.33, 0.34, 0.34],
            [0.15, 0.25, 0.2],
            [0.62, 0.6, 0.55],
        ]);
        let color = self.dice.near(base, 0.05, 0.02);
        self.dice.habit(color, ids::POLE)
    }

    fn sign_post(&mut self) -> Sign {
        let shape = self.dice.pick(&[
            SignShape::Round,
            SignShape::Triangle,
            SignShape::Board,
            SignShape::Board,
            SignShape::TrafficLight,
            SignShape::TrafficLight,
        ]);
        let size = match shape {
            SignShape::Round => [self.dice.uniform(0.85, 1.2); 2],
            SignShape::Triangle => [self.dice.uniform(1.05, 1.4), self.dice.uniform(0.95, 1.2)],
            SignShape::Board => [self.dice.uniform(0.9, 1.8), self.dice.uniform(0.7, 1.2)],
            SignShape::TrafficLight => [self.dice.uniform(0.5, 0.65), self.dice.uniform(1.25, 1.6)],
        };
        let red = [0.62, 0.08, 0.08];
        let (rim, face) = match shape {
            SignShape::TrafficLight => ([0.05, 0.055, 0.055], [0.05; 3]),
            _ if self.dice.disguise(0.15) => (scale(self.metal(), 0.9), self.tones.any(self.dice)),
            SignShape::Round | SignShape::Triangle => {
                (red, self.dice.pick(&[[0.85, 0.85, 0.83], [0.12, 0.25, 0.6], [0.85, 0.7, 0.15]]))
            }
            SignShape::Board => {
                let face = self.dice.pick(&[
                    [0.1, 0.22, 0.55],
                    [0.08, 0.33, 0.2],
                    [0.85, 0.85, 0.83],
                    [0.8, 0.65, 0.15],
                    [0.35, 0.2, 0.1],
                ]);
                ([0.85, 0.85, 0.83], face)
            }
        };
        let face = self.dice.near(face, 0.06, 0.03);
        Sign { shape, size, middle: self.dice.uniform(2.0, 3.1), rim, face, post: self.metal(), salt: self.dice.salt() }
    }

    fn people(&mut self) {
        for _ in 0..self.dice.count(4, 7) {
            let side = usize::from(self.dice.chance(0.5));
            let crosses = self.dice.chance(0.2);
            let x = if crosses {
                let kerbs = self.town.street.kerbs;
                self.dice.uniform(kerbs[0], kerbs[1])
            } else {
                self.on_pavement(side, [0.15, 0.95])
            };
            let z = self.depth(x, if crosses { 7.0 } else { 5.5 }, 1.9);
            let pedestrian = Pedestrian {
                height: self.dice.uniform(1.45, 1.95),
                clothes: self.clothes(ids::PEDESTRIAN),
                stride: self.dice.uniform(0.0, 0.12),
                breadth: self.dice.uniform(0.105, 0.15),
                long_coat: self.dice.chance(0.35),
                bag: self.dice.chance(0.3).then(|| (self.dice.sign(), self.dice.near([0.3; 3], 0.25, 0.15))),
                salt: self.dice.salt(),
            };
            self.put(x, z, Thing::Pedestrian(pedestrian));
        }
        for _ in 0..self.dice.count(1, 2) {
            let kerbs = self.town.street.kerbs;
            let t = self.dice.uniform(0.08, 0.92);
            let x = kerbs[0] + (kerbs[1] - kerbs[0]) * t;
            let z = self.depth(x, 6.0, 2.0);
            let clothes = self.clothes(ids::BICYCLIST);
            let frame = if self.dice.chance(0.4) { self.metal() } else { self.dice.near([0.4; 3], 0.2, 0.25) };
            let cyclist = Cyclist {
                clothes,
                frame,
                side: self.dice.chance(0.55).then(|| self.dice.sign()),
                size: self.dice.uniform(0.95, 1.12),
                helmet: self.dice.chance(0.5),
                salt: self.dice.salt(),
            };
            self.put(x, z, Thing::Cyclist(cyclist));
        }
    }

    fn clothes(&mut self, id: u8) -> Clothes {
        let coat =
            if self.dice.disguise(0.3) { self.tones.any(self.dice) } else { self.dice.near([0.4; 3], 0.3, 0.25) };
        let coat = self.dice.habit(coat, id);
        let legs = self.dice.pick(&[[0.08, 0.08, 0.1], [0.15, 0.18, 0.3], [0.35, 0.31, 0.25], [0.4, 0.4, 0.42]]);
        let skin = self.dice.pick(&[[0.75, 0.55, 0.45], [0.6, 0.42, 0.32], [0.36, 0.24, 0.18]]);
        let hair = self.dice.pick(&[[0.1, 0.08, 0.06], [0.35, 0.22, 0.12], [0.6, 0.5, 0.35], [0.55, 0.55, 0.55]]);
        Clothes { coat, legs: self.dice.near(legs, 0.04, 0.03), skin: self.dice.near(skin, 0.05, 0.02), hair }
    }
}
