//! Random draws of a scene in f32, hashing and value noise. Lattice values come from whole-number hashes, so texture
//! does not depend on the order pixels are visited in.

use segdistill_ops::rng::Stream;

/// The stream a scene is laid out with.
pub(super) struct Dice(pub(super) Stream);

impl Dice {
    pub(super) fn uniform(&mut self, low: f32, high: f32) -> f32 {
        self.0.uniform(f64::from(low), f64::from(high)) as f32
    }

    pub(super) fn chance(&mut self, p: f32) -> bool {
        self.0.chance(f64::from(p))
    }

    /// A whole number in `low..=high`.
    pub(super) fn count(&mut self, low: i64, high: i64) -> i64 {
        self.0.between(low, high)
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.0.below(from.len() as u64) as usize]
    }

    /// -1 or 1.
    pub(super) fn sign(&mut self) -> f32 {
        if self.chance(0.5) { 1.0 } else { -1.0 }
    }

    pub(super) fn salt(&mut self) -> u32 {
        self.0.word()
    }

    /// `color` with a common and a separate change of each channel.
    pub(super) fn near(&mut self, color: [f32; 3], common: f32, apart: f32) -> [f32; 3] {
        let shift = self.uniform(-common, common);
        color.map(|v| (v + shift + self.uniform(-apart, apart)).clamp(0.02, 0.98))
    }
}

/// Mixes two lattice coordinates and a salt into 32 bits.
pub(super) fn hash(x: i32, y: i32, salt: u32) -> u32 {
    let mut h = (x as u32).wrapping_mul(0x9e37_79b1) ^ (y as u32).wrapping_mul(0x85eb_ca77) ^ salt;
    h = (h ^ (h >> 15)).wrapping_mul(0x2c1b_3c6d);
    h = (h ^ (h >> 12)).wrapping_mul(0x297a_2d39);
    h ^ (h >> 15)
}

/// [`hash`] as a number in [0, 1).
pub(super) fn hash_unit(x: i32, y: i32, salt: u32) -> f32 {
    (hash(x, y, salt) >> 8) as f32 * (1.0 / (1 << 24) as f32)
}

/// Smooth noise in [-1, 1], one feature a unit.
pub(super) fn noise(x: f32, y: f32, salt: u32) -> f32 {
    let (fx, fy) = (x.floor(), y.floor());
    let (ix, iy) = (fx as i32, fy as i32);
    let smooth = |t: f32| t * t * (3.0 - 2.0 * t);
    let (tx, ty) = (smooth(x - fx), smooth(y - fy));
    let (ix1, iy1) = (ix.wrapping_add(1), iy.wrapping_add(1));
    let mix = |a: f32, b: f32, t: f32| a + (b - a) * t;
    let upper = mix(hash_unit(ix, iy, salt), hash_unit(ix1, iy, salt), tx);
    let lower = mix(hash_unit(ix, iy1, salt), hash_unit(ix1, iy1, salt), tx);
    mix(upper, lower, ty) * 2.0 - 1.0
}

/// Two octaves of [`noise`], in [-1, 1].
pub(super) fn cloud(x: f32, y: f32, salt: u32) -> f32 {
    0.65 * noise(x, y, salt) + 0.35 * noise(x * 2.3 + 7.1, y * 2.3 + 3.7, salt ^ 0x5bd1)
}
