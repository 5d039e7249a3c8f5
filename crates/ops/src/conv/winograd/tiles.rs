//! Where the 2x2 tiles of an output lie, and what they see of the input.

use std::ops::Range;

use crate::conv::geometry::Geometry;
use crate::kernels::Run;

/// Tiles of an image, row by row of each grid.
pub(super) struct Tiles {
    rows: Vec<TileRow>,
    pub(super) len: usize,
}

/// Neighbouring tiles: tile `k` starts at output pixel `(y, x + 2 dilation k)`.
#[derive(Clone, Copy)]
pub(super) struct TileRow {
    /// Number of the first tile in the image.
    pub(super) first: usize,
    pub(super) len: usize,
    pub(super) y: usize,
    pub(super) x: usize,
}

impl Tiles {
    pub(super) fn new(g: &Geometry) -> Self {
        let [dy, dx] = g.dilation;
        let (mut rows, mut first) = (Vec::new(), 0);
        for py in 0..dy.min(g.oh) {
            for px in 0..dx.min(g.ow) {
                let len = (g.ow - px).div_ceil(dx).div_ceil(2);
                for y in (py..g.oh).step_by(2 * dy) {
                    rows.push(TileRow { first, len, y, x: px });
                    first += len;
                }
            }
        }
        Self { rows, len: first }
    }

    /// `f(place in the panel, part of a row)` for the tiles of a panel.
    #[inline(always)]
    pub(super) fn parts(&self, g: &Geometry, panel: &Range<usize>, mut f: impl FnMut(usize, TileRow)) {
        let from = self.rows.partition_point(|row| row.first + row.len <= panel.start);
        for row in self.rows[from..].iter().take_while(|row| row.first < panel.end) {
            let (start, end) = (row.first.max(panel.start), (row.first + row.len).min(panel.end));
            let x = row.x + 2 * g.dilation[1] * (start - row.first);
            f(start - panel.start, TileRow { first: start, len: end - start, x, ..*row });
        }
    }

    /// Where row `r` and column `j` of every tile's patch lie on a map `[h, w]` that starts `padding` before the output.
    pub(super) fn runs(
        &self,
        g: &Geometry,
        panel: &Range<usize>,
        at: [usize; 2],
        padding: [usize; 2],
        hw: [usize; 2],
    ) -> Vec<Run> {
        let step = 2 * g.dilation[1];
        let mut runs = Vec::with_capacity(4);
        self.parts(g, panel, |place, row| {
            let Some(y) = (row.y + at[0] * g.dilation[0]).checked_sub(padding[0]).filter(|&y| y < hw[0]) else {
                return;
            };
            // Column of tile k: x + step k - padding, in 0..w.
            let x = row.x + at[1] * g.dilation[1];
            let lo = padding[1].saturating_sub(x).div_ceil(step).min(row.len);
            let hi = (hw[1] + padding[1]).saturating_sub(x).div_ceil(step).min(row.len);
            if lo < hi {
                runs.push(Run { at: place + lo, len: hi - lo, from: y * hw[1] + x + step * lo - padding[1] });
            }
        });
        runs
    }
}
