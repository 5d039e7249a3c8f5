//! Times `conv2d`, forward and forward with backward, on the shapes that segmentation networks have.
//!
//! `cargo bench -p segdistill-benches --bench conv [FILTER]` prints the least of several runs in milliseconds and the
//! rate that the multiply-adds give (forward 2 per MAC, with backward 6, or 4 where the image needs no gradient). Some
//! outputs of every case are checked against plain sums before it is timed.

use candle_core::{Result, Tensor, Var};
use segdistill_benches::{filter, least, wave};
use segdistill_ops::{Conv2dConfig, conv2d};

struct Case {
    name: &'static str,
    input: [usize; 4],
    weight: [usize; 4],
    cfg: Conv2dConfig,
    /// Whether the input is an image batch, which needs no gradient.
    image: bool,
}

fn case(name: &'static str, input: [usize; 4], c_out: usize, k: usize, stride: usize, d: usize, groups: usize) -> Case {
    let padding = d * (k - 1) / 2;
    Case {
        name,
        input,
        weight: [c_out, input[1] / groups, k, k],
        cfg: Conv2dConfig { stride: [stride; 2], padding: [padding; 2], dilation: [d; 2], groups },
        image: input[1] == 3,
    }
}

fn main() -> Result<()> {
    let filter = filter();
    let cases = [
        case("3x3 64->64", [4, 64, 90, 120], 64, 3, 1, 1, 1),
        case("3x3/2 64->64", [4, 64, 90, 120], 64, 3, 2, 1, 1),
        case("3x3 d2 64->64", [4, 64, 90, 120], 64, 3, 1, 2, 1),
        case("1x1 64->64", [4, 64, 90, 120], 64, 1, 1, 1, 1),
        case("1x1 256->64", [4, 256, 45, 60], 64, 1, 1, 1, 1),
        case("1x1/2 64->128", [4, 64, 90, 120], 128, 1, 2, 1, 1),
        case("stem 7x7/2 3->64", [4, 3, 360, 480], 64, 7, 2, 1, 1),
        case("stem 3x3/2 3->32", [4, 3, 360, 480], 32, 3, 2, 1, 1),
        case("3x3 128->128 20x28", [8, 128, 20, 28], 128, 3, 1, 1, 1),
        case("3x3 512->512 11x15", [4, 512, 11, 15], 512, 3, 1, 1, 1),
        case("3x3 16->16 40x56", [8, 16, 40, 56], 16, 3, 1, 1, 1),
        case("3x3 32->32 40x56", [8, 32, 40, 56], 32, 3, 1, 1, 1),
        case("3x3/2 16->32 80x112", [8, 16, 80, 112], 32, 3, 2, 1, 1),
        case("3x3 g32 64->64", [4, 64, 90, 120], 64, 3, 1, 1, 32),
        case("dw 3x3 728 b1", [1, 728, 32, 32], 728, 3, 1, 1, 728),
        case("dw 3x3 728 b4", [4, 728, 32, 32], 728, 3, 1, 1, 728),
        case("dw 3x3/2 144", [4, 144, 90, 120], 144, 3, 2, 1, 144),
        case("dw 5x5 240", [4, 240, 45, 60], 240, 5, 1, 1, 240),
    ];
    println!("{:<22} {:>9} {:>9} {:>9} {:>9}", "case", "fwd ms", "GFLOP/s", "f+b ms", "GFLOP/s");
    for case in cases.iter().filter(|c| c.name.contains(&filter)) {
        let x = wave(&case.input)?;
        let x = if case.image { x } else { Var::from_tensor(&x)?.as_tensor().clone() };
        let frozen = wave(&case.weight)?;
        let weight = Var::from_tensor(&frozen)?;
        let frozen_x = x.detach();
        let y = conv2d(&frozen_x, &frozen, None, case.cfg).map_err(candle_core::Error::wrap)?;
        check(case, &frozen_x, &frozen, &y)?;
        let macs = (y.elem_count() * case.weight[1..].iter().product::<usize>()) as f64;
        let forward =
            least(|| conv2d(&frozen_x, &frozen, None, case.cfg).map(|_| ()).map_err(candle_core::Error::wrap))?;
        // Candle starts from a gradient of ones: nothing but the convolution and its two gradients is timed.
        let both = least(|| {
            conv2d(&x, weight.as_tensor(), None, case.cfg).map_err(candle_core::Error::wrap)?.backward().map(|_| ())
        })?;
        let factor = if case.image { 4.0 } else { 6.0 };
        println!(
            "{:<22} {:>9.2} {:>9.0} {:>9.2} {:>9.0}",
            case.name,
            forward * 1e3,
            2.0 * macs / forward / 1e9,
            both * 1e3,
            factor * macs / both / 1e9
        );
    }
    Ok(())
}

/// Compares some outputs with the sum the convolution is.
fn check(case: &Case, x: &Tensor, weight: &Tensor, y: &Tensor) -> Result<()> {
    let host = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
    let (x, weight, (_, c_out, oh, ow), y) = (host(x)?, host(weight)?, y.dims4()?, host(y)?);
    let [_, c_in, h, w] = case.input;
    let [_, per_group, kh, kw] = case.weight;
    for k in (0..y.len()).step_by(y.len() / 7 + 1) {
        let (ox, oy, co, n) = (k % ow, k / ow % oh, k / (ow * oh) % c_out, k / (ow * oh * c_out));
        let first = co / (c_out / case.cfg.groups) * per_group;
        let mut sum = 0f64;
        for ci in 0..per_group {
            for ky in 0..kh {
                for kx in 0..kw {
                    let row = (oy * case.cfg.stride[0] + ky * case.cfg.dilation[0]).wrapping_sub(case.cfg.padding[0]);
                    let column =
                        (ox * case.cfg.stride[1] + kx * case.cfg.dilation[1]).wrapping_sub(case.cfg.padding[1]);
                    if row < h && column < w {
                        let at = ((n * c_in + first + ci) * h + row) * w + column;
                        sum += f64::from(x[at]) * f64::from(weight[((co * per_group + ci) * kh + ky) * kw + kx]);
                    }
                }
            }
        }
        assert!((f64::from(y[k]) - sum).abs() < 1e-2, "{}: output {k} is {}, the sum is {sum}", case.name, y[k]);
    }
    Ok(())
}
