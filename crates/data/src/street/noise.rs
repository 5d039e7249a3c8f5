//! Random draws of a scene in f32, hashing and value noise. Lattice values come from whole-number hashes, so texture
//! does not depend on the order pixels are visited in.

use segdistill_ops::rng::Stream;

use super::ids;

/// The stream a scene is laid out with.
pub(super) struct Dice {
    stream: Stream,
    /// As `StreetScenesConfig::variety`.
    pub(super) variety: f32,
}

impl Dice {
    pub(super) fn new(stream: Stream, variety: f64) -> Self {
        Self { stream, variety: variety as f32 }
    }

    /// True with probability `p * variety`: for what makes classes look alike.
    pub(super) fn disguise(&mut self, p: f32) -> bool {
        self.chance(p * self.variety)
    }

    /// Uniform around the middle of the range, over its whole width at variety 1.
    pub(super) fn vary(&mut self, low: f32, high: f32) -> f32 {
        let (middle, half) = ((low + high) * 0.5, (high - low) * 0.5 * self.variety);
        self.uniform(middle - half, middle + half)
    }

    /// `color` at variety 1; towards the tone that `id`'s class has by habit below.
    pub(super) fn habit(&self, color: [f32; 3], id: u8) -> [f32; 3] {
        let tone = match id {
            ids::CAR => [0.55, 0.1, 0.1],
            ids::PEDESTRIAN => [0.85, 0.5, 0.12],
            ids::BICYCLIST => [0.1, 0.62, 0.68],
            ids::POLE => [0.16, 0.16, 0.3],
            ids::FENCE => [0.5, 0.3, 0.5],
            ids::PAVEMENT => [0.62, 0.54, 0.42],
            ids::TREE => [0.2, 0.36, 0.12],
            _ => color,
        };
        let share = 1.0 - self.variety;
        std::array::from_fn(|i| color[i] + (tone[i] - color[i]) * share)
    }
    pub(super) fn uniform(&mut self, low: f32, high: f32) -> f32 {
        self.stream.uniform(f64::from(low), f64::from(high)) as f32
    }

    pub(super) fn chance(&mut self, p: f32) -> bool {
        self.stream.chance(f64::from(p))
    }

    /// A whole number in `low..=high`.
    pub(super) fn count(&mut self, low: i64, high: i64) -> i64 {
        self.stream.between(low, high)
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.stream.below(from.len() as u64) as usize]
    }

    /// -1 or 1.
    pub(super) fn sign(&mut self) -> f32 {
        if self.chance(0.5) { 1.0 } else { -1.0 }
    }

    pub(super) fn salt(&mut self) -> u32 {
        self.stream.word()
    }

    /// `color` with a common and a separate change of each channel.
    pub(super) fn near(&mut self, color: [f32; 3], common: f32, apart: f32) -> [f32; 3] {
        let shift = self.uniform(-common, common);
        color.map(|v| (v + shift + self.uniform(-apart, apart)).clamp(0.02, 0.98))
    }
}

/// Largest whole number not above `v`; `f32::floor` is a library call on the plain x86-64 target.
pub(super) fn floor(v: f32) -> i32 {
    let cut = v as i32;
    cut - i32::from(v < cut as f32)
}

/// `v / period` without its whole part, in [0, 1).
pub(super) fn phase(v: f32, period: f32) -> f32 {
    let turns = v / period;
    turns - floor(turns) as f32
}

const ACROSS: u32 = 0x9e37_79b1;
const DOWN: u32 = 0x85eb_ca77;

/// Spreads a sum of lattice steps over 32 bits; the high bits are the best mixed.
fn spread(sum: u32) -> u32 {
    let h = (sum ^ (sum >> 15)).wrapping_mul(0x2c1b_3c6d);
    let h = (h ^ (h >> 13)).wrapping_mul(0x297a_2d39);
    h ^ (h >> 16)
}

/// Mixes two lattice coordinates and a salt into 32 bits.
pub(super) fn hash(x: i32, y: i32, salt: u32) -> u32 {
    spread((x as u32).wrapping_mul(ACROSS).wrapping_add((y as u32).wrapping_mul(DOWN)).wrapping_add(salt))
}

/// [`hash`] as a number in [0, 1).
pub(super) fn hash_unit(x: i32, y: i32, salt: u32) -> f32 {
    (hash(x, y, salt) >> 8) as i32 as f32 * (1.0 / (1 << 24) as f32)
}

/// Smooth noise in [-1, 1], one feature a unit.
pub(super) fn noise(x: f32, y: f32, salt: u32) -> f32 {
    let (ix, iy) = (floor(x), floor(y));
    let smooth = |t: f32| t * t * (3.0 - 2.0 * t);
    let (tx, ty) = (smooth(x - ix as f32), smooth(y - iy as f32));
    let mix = |a: f32, b: f32, t: f32| a + (b - a) * t;
    let here = (ix as u32).wrapping_mul(ACROSS).wrapping_add((iy as u32).wrapping_mul(DOWN)).wrapping_add(salt);
    let corner = |step: u32| (spread(here.wrapping_add(step)) >> 8) as i32 as f32 * (1.0 / (1 << 24) as f32);
    let upper = mix(corner(0), corner(ACROSS), tx);
    let lower = mix(corner(DOWN), corner(ACROSS.wrapping_add(DOWN)), tx);
    mix(upper, lower, ty) * 2.0 - 1.0
}

/// Two octaves of [`noise`], in [-1, 1].
pub(super) fn cloud(x: f32, y: f32, salt: u32) -> f32 {
    0.65 * noise(x, y, salt) + 0.35 * noise(x * 2.3 + 7.1, y * 2.3 + 3.7, salt ^ 0x5bd1)
}
