//! Nodes of a relation between places of one image: a pixel each, or the counted pixels of a pooling window; their
//! features as unit vectors, and the way back from there to the map.

use crate::host::Real;

/// Norms up to this are taken as 0: the node has no direction. PyTorch's `normalize` has the same number.
const EPSILON: f64 = 1e-12;

/// What a pooling window makes of its pixels, channel by channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeKind {
    /// The largest feature; of equal ones the first in reading order, which alone gets the gradient.
    #[default]
    Max,
    /// The mean.
    Average,
}

/// The nodes of one image.
pub(crate) struct Nodes {
    /// Where the pixels of each node begin in `places`, and their end.
    starts: Vec<usize>,
    /// Pixels of the map that count, node by node.
    places: Vec<u32>,
}

impl Nodes {
    /// Every pixel that counts is a node.
    pub(crate) fn pixels(valid: &[u8]) -> Self {
        let places: Vec<u32> = (0u32..).zip(valid).filter(|(_, v)| **v == 1).map(|(p, _)| p).collect();
        Self { starts: (0..=places.len()).collect(), places }
    }

    /// Windows of `kernel` side by side, the last of a row or column cut off by the border; one without a pixel that
    /// counts is no node.
    pub(crate) fn windows(valid: &[u8], [h, w]: [usize; 2], kernel: [usize; 2]) -> Self {
        let mut nodes = Self { starts: vec![0], places: Vec::new() };
        for top in (0..h).step_by(kernel[0]) {
            for left in (0..w).step_by(kernel[1]) {
                for y in top..h.min(top.saturating_add(kernel[0])) {
                    let row = y * w..(y + 1) * w;
                    for x in left..w.min(left.saturating_add(kernel[1])) {
                        if valid[row.start + x] == 1 {
                            nodes.places.push((row.start + x) as u32);
                        }
                    }
                }
                if nodes.places.len() > nodes.starts[nodes.starts.len() - 1] {
                    nodes.starts.push(nodes.places.len());
                }
            }
        }
        nodes
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.starts.len() - 1
    }

    fn pixels_of(&self, node: usize) -> &[u32] {
        &self.places[self.starts[node]..self.starts[node + 1]]
    }

    /// Whether each node is one pixel.
    fn are_pixels(&self) -> bool {
        self.places.len() == self.len()
    }
}

/// How features become unit vectors.
#[derive(Clone, Copy)]
pub(crate) struct Normal {
    pub(crate) kind: NodeKind,
    /// Added to each norm before the division.
    pub(crate) added: f64,
    /// Whether the gradient takes the norm for a constant.
    pub(crate) detached: bool,
}

/// Unit vectors of consecutive nodes of one image.
pub(crate) struct Units<C> {
    /// Nodes.
    pub(crate) len: usize,
    /// `[d, len]`: `z / (||z|| + added)`, 0 where the node has no direction.
    pub(crate) f: Vec<C>,
    first: usize,
    /// `[len]`: `1 / (||z|| + added)`, 0 where `f` is.
    inverse_norm: Vec<f64>,
    /// `[d, len]` pixels that a maximum came from; empty for a mean.
    picks: Vec<u32>,
    normal: Normal,
}

impl<C: Real> Units<C> {
    /// Nodes `first..first + len` of an image `[d, m]`. Formed in f64.
    pub(crate) fn new<T: Real>(
        map_dm: &[T],
        m: usize,
        nodes: &Nodes,
        first: usize,
        len: usize,
        normal: Normal,
    ) -> Self {
        let d = map_dm.len() / m;
        let mut z = vec![0.0; d * len];
        let mut picks = Vec::new();
        let max = normal.kind == NodeKind::Max && !nodes.are_pixels();
        for (row, z) in map_dm.chunks(m).zip(z.chunks_mut(len)) {
            if nodes.are_pixels() {
                for (z, &place) in z.iter_mut().zip(&nodes.places[first..]) {
                    *z = row[place as usize].wide();
                }
            } else if max {
                for (k, z) in z.iter_mut().enumerate() {
                    let pixels = nodes.pixels_of(first + k);
                    let mut pick = pixels[0];
                    for &p in &pixels[1..] {
                        let (value, best) = (row[p as usize].wide(), row[pick as usize].wide());
                        // NaN wins, to be seen in the loss.
                        if value > best || value.is_nan() {
                            pick = p;
                        }
                    }
                    *z = row[pick as usize].wide();
                    picks.push(pick);
                }
            } else {
                for (k, z) in z.iter_mut().enumerate() {
                    let pixels = nodes.pixels_of(first + k);
                    *z = pixels.iter().map(|&p| row[p as usize].wide()).sum::<f64>() / pixels.len() as f64;
                }
            }
        }
        let mut inverse_norm = vec![0.0; len];
        let mut f = vec![C::zero(); d * len];
        segdistill_ops::vectorised(
            #[inline(always)]
            || {
                for row in z.chunks(len) {
                    for (sum, z) in inverse_norm.iter_mut().zip(row) {
                        *sum += z * z;
                    }
                }
                for value in &mut inverse_norm {
                    let norm = value.sqrt();
                    // NaN fails the comparison and goes on, to be seen in the loss.
                    *value = if norm <= EPSILON { 0.0 } else { 1.0 / (norm + normal.added) };
                }
                for (row, f) in z.chunks(len).zip(f.chunks_mut(len)) {
                    for ((f, z), inverse) in f.iter_mut().zip(row).zip(&inverse_norm) {
                        *f = C::narrow(z * inverse);
                    }
                }
            },
        );
        Self { len, f, first, inverse_norm, picks, normal }
    }

    /// `scale * dL/dz` in place of `dL/df` (`[d, len]`): with `r = ||z||` and `a` what is added to it,
    /// `dL/dz = (dL/df - (1 + a / r) f (f . dL/df)) / (r + a)`, without the second term where the norm is detached.
    pub(crate) fn chain(&self, grad: &mut [C], scale: f64) {
        let len = self.len;
        segdistill_ops::vectorised(
            #[inline(always)]
            || {
                let mut along = vec![0.0; len];
                if !self.normal.detached {
                    for (f, g) in self.f.chunks(len).zip(grad.chunks(len)) {
                        for ((along, f), g) in along.iter_mut().zip(f).zip(g) {
                            *along += f.wide() * g.wide();
                        }
                    }
                    for (along, inverse) in along.iter_mut().zip(&self.inverse_norm) {
                        *along /= 1.0 - self.normal.added * inverse;
                    }
                }
                for (f, g) in self.f.chunks(len).zip(grad.chunks_mut(len)) {
                    for (((g, f), along), inverse) in g.iter_mut().zip(f).zip(&along).zip(&self.inverse_norm) {
                        *g = C::narrow(scale * (g.wide() - f.wide() * along) * inverse);
                    }
                }
            },
        );
    }

    /// Adds one channel of `dL/dz` (`[d, len]`) to the pixels that it came from; the windows do not overlap.
    pub(crate) fn spread<T: Real>(&self, nodes: &Nodes, grad: &[C], channel: usize, row: &mut [T]) {
        let part = channel * self.len..(channel + 1) * self.len;
        let grad = &grad[part.clone()];
        if nodes.are_pixels() {
            for (g, &place) in grad.iter().zip(&nodes.places[self.first..]) {
                row[place as usize] = T::narrow(g.wide());
            }
        } else if self.picks.is_empty() {
            for (k, g) in grad.iter().enumerate() {
                let pixels = nodes.pixels_of(self.first + k);
                for &p in pixels {
                    row[p as usize] = T::narrow(g.wide() / pixels.len() as f64);
                }
            }
        } else {
            for (g, &p) in grad.iter().zip(&self.picks[part]) {
                row[p as usize] = T::narrow(g.wide());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_hold_the_pixels_that_count() {
        let valid = [1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1];
        let nodes = Nodes::windows(&valid, [3, 5], [2, 3]);
        let pixels: Vec<&[u32]> = (0..nodes.len()).map(|k| nodes.pixels_of(k)).collect();
        // The window at the lower left has no such pixel.
        assert_eq!(pixels, [&[0, 1, 6, 7][..], &[3, 8], &[14]]);
        assert_eq!(Nodes::windows(&valid, [3, 5], [usize::MAX, 9]).len(), 1);
        assert_eq!(Nodes::windows(&[0; 15], [3, 5], [1, 1]).len(), 0);
        let single = Nodes::pixels(&valid);
        assert!(single.are_pixels() && single.len() == 7 && single.pixels_of(2) == [3]);
    }
}
