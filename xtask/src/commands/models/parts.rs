//! The parts networks are made of, each drawn from what the real operation gives for a few numbers.

use anyhow::Result;
use candle_core::{Device, Tensor};

use segdistill_ops::{
    Conv2dConfig, ConvTranspose2dConfig, Pool2dConfig, avg_pool2d, bed_of_nails_unpool2d, conv_transpose2d, conv2d,
    max_pool2d_with_indices, max_unpool2d, nearest_unpool2d, resize_bilinear,
};

use super::draw::{arrow, open, text};

/// Figures of [`figures`].
pub(super) const N_FIGURES: usize = 8;

const CELL: f64 = 30.0;

/// What stands between a grid and the one before it.
#[derive(Clone, Copy)]
enum Before {
    /// An arrow: this one is made from what came before.
    Arrow,
    /// A word: made from the same as the one before, or together with it.
    Word(&'static str),
}

/// A grid of numbers with what stands above it.
struct Grid {
    before: Before,
    title: &'static str,
    rows: Vec<Vec<f32>>,
}

impl Grid {
    /// Channel `c` of the first map.
    fn new(title: &'static str, map_nchw: &Tensor, c: usize) -> Result<Self> {
        Ok(Self { before: Before::Arrow, title, rows: map_nchw.get(0)?.get(c)?.to_vec2()? })
    }

    fn after(word: &'static str, grid: Result<Self>) -> Result<Self> {
        Ok(Self { before: Before::Word(word), ..grid? })
    }
}

/// `[1, c, h, w]` from numbers.
fn map(values: &[f32], [c, h, w]: [usize; 3]) -> Result<Tensor> {
    Ok(Tensor::from_slice(values, (1, c, h, w), &Device::Cpu)?)
}

/// Every figure with its name.
pub(super) fn figures() -> Result<Vec<(&'static str, String)>> {
    let four = map(&[1., 3., 2., 0., 5., 4., 1., 7., 0., 2., 9., 3., 6., 1., 8., 4.], [1, 4, 4])?;
    let two = map(&[1., 2., 3., 4.], [1, 2, 2])?;
    let pool = Pool2dConfig { kernel: [2, 2], stride: [2, 2], padding: [0, 0], ceil_mode: false };
    let (maxima, indices) = max_pool2d_with_indices(&four, pool)?;

    let mut dot = vec![0.0; 49];
    dot[24] = 1.0;
    let dot = map(&dot, [1, 7, 7])?;
    let nine = map(&[1., 2., 3., 4., 5., 6., 7., 8., 9.], [1, 3, 3])?;
    let seen = |dilation: usize| -> Result<Tensor> {
        let cfg = Conv2dConfig { padding: [dilation; 2], dilation: [dilation; 2], ..Conv2dConfig::default() };
        Ok(conv2d(&dot, &nine, None, cfg)?)
    };

    let pair = map(&[1., 0., 0., 0., 1., 0., 0., 0., 1., 0., 0., 1., 0., 1., 0., 1., 0., 0.], [2, 3, 3])?;
    let kernels = Tensor::ones((2, 1, 3, 3), candle_core::DType::F32, &Device::Cpu)?;
    let cfg = Conv2dConfig { padding: [1, 1], groups: 2, ..Conv2dConfig::default() };
    let depthwise = conv2d(&pair, &kernels, None, cfg)?;
    let mix = Tensor::from_slice(&[1f32, 10.0], (1, 2, 1, 1), &Device::Cpu)?;
    let pointwise = conv2d(&depthwise, &mix, None, Conv2dConfig::default())?;

    let ones = Tensor::ones((1, 1, 3, 3), candle_core::DType::F32, &Device::Cpu)?;
    let stride = ConvTranspose2dConfig { stride: [2, 2], ..ConvTranspose2dConfig::default() };
    let laid = conv_transpose2d(&two, &ones, None, stride)?;

    let figure = |name, grids: Vec<Result<Grid>>| -> Result<(&'static str, String)> {
        Ok((name, drawn(&grids.into_iter().collect::<Result<Vec<_>>>()?)))
    };
    Ok(vec![
        figure(
            "pooling",
            vec![
                Grid::new("map", &four, 0),
                Grid::new("maximum of 2x2", &maxima, 0),
                Grid::after("or", Grid::new("average of 2x2", &avg_pool2d(&four, pool)?, 0)),
            ],
        )?,
        figure(
            "dilated-convolution",
            vec![
                Grid::new("one pixel", &dot, 0),
                Grid::new("3x3 convolution", &seen(1)?, 0),
                Grid::after("or", Grid::new("dilation 2", &seen(2)?, 0)),
                Grid::after("or", Grid::new("dilation 3", &seen(3)?, 0)),
            ],
        )?,
        figure(
            "separable-convolution",
            vec![
                Grid::new("channel 1", &pair, 0),
                Grid::after("and", Grid::new("channel 2", &pair, 1)),
                Grid::new("depthwise 1", &depthwise, 0),
                Grid::after("and", Grid::new("depthwise 2", &depthwise, 1)),
                Grid::new("1 x first + 10 x second", &pointwise, 0),
            ],
        )?,
        figure(
            "transposed-convolution",
            vec![
                Grid::new("map", &two, 0),
                Grid::after("and", Grid::new("kernel", &ones, 0)),
                Grid::new("laid at stride 2, added", &laid, 0),
            ],
        )?,
        figure(
            "nearest-unpooling",
            vec![Grid::new("map", &two, 0), Grid::new("every pixel four times", &nearest_unpool2d(&two, 2)?, 0)],
        )?,
        figure(
            "bed-of-nails-unpooling",
            vec![Grid::new("map", &two, 0), Grid::new("the first of four", &bed_of_nails_unpool2d(&two, 2)?, 0)],
        )?,
        figure(
            "max-unpooling",
            vec![
                Grid::new("before pooling", &four, 0),
                Grid::new("pooled", &maxima, 0),
                Grid::new("back where it was", &max_unpool2d(&maxima, &indices, [4, 4])?, 0),
            ],
        )?,
        figure(
            "bilinear",
            vec![
                Grid::new("map", &two, 0),
                Grid::new("by pixel centres", &resize_bilinear(&two, [4, 4], false)?, 0),
                Grid::after("or", Grid::new("corners aligned", &resize_bilinear(&two, [4, 4], true)?, 0)),
            ],
        )?,
    ])
}

/// Grids beside one another, darker where the number is larger.
fn drawn(grids: &[Grid]) -> String {
    const GAP: f64 = 44.0;
    let side = |grid: &Grid| CELL * grid.rows.len() as f64;
    // A title may be wider than its grid.
    let slot = |grid: &Grid| (CELL * grid.rows[0].len() as f64).max(7.2 * grid.title.len() as f64);
    let width = grids.iter().map(|grid| slot(grid) + GAP).sum::<f64>() - GAP + 24.0;
    let tallest = grids.iter().map(side).fold(0.0, f64::max);
    let mut svg = open(width, tallest + 48.0);
    let mut x = 12.0;
    for (i, grid) in grids.iter().enumerate() {
        let largest = grid.rows.iter().flatten().fold(0f32, |a, &b| a.max(b)).max(1e-6);
        let left = x + (slot(grid) - CELL * grid.rows[0].len() as f64) / 2.0;
        let top = 34.0 + (tallest - side(grid)) / 2.0;
        text(&mut svg, x + slot(grid) / 2.0, 20.0, "middle", 13, grid.title);
        for (r, row) in grid.rows.iter().enumerate() {
            for (c, &value) in row.iter().enumerate() {
                let (cx, cy) = (left + CELL * c as f64, top + CELL * r as f64);
                let opacity = 0.55 * f64::from(value / largest);
                svg.push_str(&format!(
                    "<rect x=\"{cx:.1}\" y=\"{cy:.1}\" width=\"{CELL}\" height=\"{CELL}\" fill=\"#4f7cac\" \
                     fill-opacity=\"{opacity:.2}\" stroke=\"#888888\"/>\n"
                ));
                text(&mut svg, cx + CELL / 2.0, cy + 19.0, "middle", 11, &number(value));
            }
        }
        if let Some(next) = grids.get(i + 1) {
            let (from, to, y) = (x + slot(grid) + 8.0, x + slot(grid) + GAP - 8.0, 34.0 + tallest / 2.0);
            match next.before {
                Before::Arrow => arrow(&mut svg, &format!("M{from:.1} {y:.1} L{to:.1} {y:.1}"), "#333333", false),
                Before::Word(word) => text(&mut svg, (from + to) / 2.0, y + 4.0, "middle", 12, word),
            }
        }
        x += slot(grid) + GAP;
    }
    svg.push_str("</svg>\n");
    svg
}

/// Up to two decimals, no trailing zeros.
fn number(value: f32) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}
