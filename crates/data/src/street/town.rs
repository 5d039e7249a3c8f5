//! Draws a street's plan: ground, skylines and rows of buildings.

use super::backdrop::{Beyond, LaneMark, Skyline, Street, WallHeights};
use super::building::Building;
use super::canvas::scale;
use super::ids;
use super::noise::Dice;
use super::weather::{Tones, leaf_color, wall_color};

/// What stands beyond the pavement of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Walls right at the pavement.
    Terrace,
    /// Houses behind gardens.
    Houses,
    /// Grass and trees.
    Park,
}

/// The fixed part of a scene.
pub(super) struct Town {
    pub(super) street: Street,
    pub(super) sides: [Side; 2],
    pub(super) skylines: Vec<Skyline>,
    /// From near to far.
    pub(super) buildings: Vec<Building>,
    pub(super) walls: WallHeights,
}

/// How far the rows of buildings reach, in metres.
const REACH: f32 = 95.0;

impl Town {
    pub(super) fn draw(dice: &mut Dice, tones: &Tones) -> Self {
        let sides = [0, 1].map(|_| dice.pick(&[Side::Terrace, Side::Terrace, Side::Houses, Side::Park]));
        let street = draw_street(dice, tones, sides);
        let skylines = (0..dice.count(1, 2))
            .map(|k| {
                let id = dice.pick(&[ids::BUILDING, ids::TREE]);
                let color = if id == ids::TREE { leaf_color(dice) } else { wall_color(dice) };
                let (height, depth) = (dice.uniform(0.03, 0.12) * (1.0 + k as f32), 110.0 + 60.0 * k as f32);
                Skyline { id, color, height, depth, salt: dice.salt() }
            })
            .collect();
        let mut buildings = Vec::new();
        for side in [0, 1] {
            row_of_buildings(dice, tones, &street, sides[side], side, &mut buildings);
        }
        if dice.chance(0.35) {
            // The street ends at a wall across.
            let z = dice.uniform(40.0, 85.0);
            let middle = street.bend * z * z;
            let mut end = draw_building(dice, tones, [middle - 26.0, middle + 26.0], [z, z + 10.0]);
            end.height = end.height.min(12.0);
            buildings.push(end);
        }
        buildings.sort_by(|a, b| a.z[0].total_cmp(&b.z[0]));
        let lines = [0, 1].map(|side| wall_line(&street, sides[side], side));
        let heights = [0, 1].map(|side| {
            let sign = if side == 0 { -1.0 } else { 1.0 };
            let mut heights = vec![0.0; REACH as usize + 40];
            for b in buildings.iter().filter(|b| b.x[0] * sign > 0.0 && b.x[1] * sign > 0.0) {
                for h in heights.iter_mut().take(b.z[1] as usize).skip(b.z[0].max(0.0) as usize) {
                    *h = b.height;
                }
            }
            heights
        });
        Self { street, sides, skylines, buildings, walls: WallHeights { lines, heights } }
    }
}

/// Lateral place of the walls on one side.
fn wall_line(street: &Street, kind: Side, side: usize) -> f32 {
    let set_back = match kind {
        Side::Terrace => 0.0,
        Side::Houses => 5.0,
        Side::Park => 22.0,
    };
    let sign = if side == 0 { -1.0 } else { 1.0 };
    street.kerbs[side] + sign * (street.pavements[side] + set_back)
}

fn draw_street(dice: &mut Dice, tones: &Tones, sides: [Side; 2]) -> Street {
    let kerbs = [-dice.uniform(2.8, 6.0), dice.uniform(2.0, 4.5)];
    let pavements = [dice.uniform(2.0, 5.0), dice.uniform(2.0, 5.0)];
    let white = dice.near([0.8, 0.8, 0.78], 0.1, 0.02);
    let mut marks = vec![LaneMark {
        x: (kerbs[0] + kerbs[1]) * 0.5 + dice.uniform(-0.5, 0.5),
        width: dice.uniform(0.1, 0.2),
        dash: dice.pick(&[[2.0, 6.0], [4.0, 6.0], [1.0, 1.0], [3.0, 9.0]]),
        color: white,
    }];
    for (side, inward) in [(0, 1.0), (1, -1.0)] {
        if dice.chance(0.6) {
            let color = if dice.chance(0.4) { [0.75, 0.62, 0.2] } else { white };
            let x = kerbs[side] + inward * dice.uniform(0.25, 0.5);
            marks.push(LaneMark { x, width: 0.11, dash: [1.0, 1.0], color });
            if dice.chance(0.5) {
                marks.push(LaneMark { x: x + inward * 0.25, width: 0.11, dash: [1.0, 1.0], color });
            }
        }
    }
    let crossing = dice.chance(0.4).then(|| {
        let z = dice.uniform(14.0, 45.0);
        [z, z + dice.uniform(6.0, 10.0)]
    });
    let zebra = dice.chance(0.25).then(|| {
        let z = dice.uniform(6.0, 25.0);
        [z, z + 2.8]
    });
    let kerb_tone = dice.uniform(0.75, 1.5);
    Street {
        kerbs,
        pavements,
        beyond: sides.map(|s| if s == Side::Terrace { Beyond::Paved } else { Beyond::Grass }),
        bend: dice.uniform(-1.0, 1.0).powi(3) * 0.004,
        crossing,
        zebra,
        marks,
        wear: dice.uniform(0.05, 0.55),
        asphalt: tones.asphalt,
        flags: tones.flags,
        kerbstone: dice.near(scale(tones.flags, kerb_tone), 0.04, 0.01),
        grass: dice.near(tones.leaf, 0.06, 0.03),
        flag_size: dice.uniform(0.5, 1.1),
        roughness: dice.uniform(0.06, 0.2),
        salt: dice.salt(),
    }
}

fn row_of_buildings(
    dice: &mut Dice,
    tones: &Tones,
    street: &Street,
    kind: Side,
    side: usize,
    buildings: &mut Vec<Building>,
) {
    let sign = if side == 0 { -1.0 } else { 1.0 };
    let line = wall_line(street, kind, side);
    let mut z = dice.uniform(-6.0, 2.0);
    while z < REACH {
        let length = if kind == Side::Terrace { dice.uniform(7.0, 22.0) } else { dice.uniform(8.0, 14.0) };
        let (near, far) = (z, z + length);
        let gap = match kind {
            Side::Terrace => f32::from(u8::from(dice.chance(0.12))) * 3.0,
            Side::Houses => dice.uniform(2.0, 8.0),
            Side::Park => dice.uniform(10.0, 50.0),
        };
        z = far + gap;
        // Nothing stands in the crossing street.
        if street.crossing.is_some_and(|[a, b]| near < b + 1.0 && far > a - 1.0) {
            z = street.crossing.map_or(z, |c| c[1] + 2.0).max(near + 1.0);
            continue;
        }
        let shift = street.bend * (near.max(0.0) + far).powi(2) * 0.25;
        let depth = dice.uniform(8.0, 16.0);
        let at = line + shift;
        let mut building = draw_building(dice, tones, [at, at + sign * depth], [near, far]);
        if kind == Side::Houses {
            building.height = building.height.min(dice.uniform(5.0, 7.5));
            building.roof = dice.uniform(1.5, 3.0);
        }
        buildings.push(building);
    }
}

fn draw_building(dice: &mut Dice, tones: &Tones, x: [f32; 2], z: [f32; 2]) -> Building {
    let storey = dice.uniform(2.7, 3.7);
    let wall = if dice.disguise(0.2) { tones.any(dice) } else { wall_color(dice) };
    let glass = match dice.count(0, 3) {
        0 | 1 => scale(tones.sky, dice.uniform(0.6, 1.1)),
        2 => dice.near([0.15, 0.17, 0.2], 0.05, 0.02),
        _ => dice.near([0.45, 0.43, 0.36], 0.1, 0.03),
    };
    let trim_tone = dice.uniform(0.3, 0.9);
    Building {
        x,
        z,
        height: storey * dice.count(2, 5) as f32 + dice.uniform(0.2, 1.4),
        roof: if dice.chance(0.5) { dice.uniform(0.8, 2.6) } else { 0.0 },
        wall,
        roof_color: dice.near([0.3, 0.27, 0.27], 0.1, 0.05),
        trim: dice.near([trim_tone; 3], 0.05, 0.03),
        glass,
        storey,
        bay: dice.uniform(1.7, 3.8),
        window: [dice.uniform(0.3, 0.8), dice.uniform(0.4, 0.7)],
        shop: dice.chance(0.4).then(|| dice.near([0.35, 0.3, 0.3], 0.25, 0.2)),
        grain: dice.uniform(0.05, 0.22),
        salt: dice.salt(),
    }
}
