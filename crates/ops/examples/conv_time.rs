//! Times `conv2d`, forward and forward with backward, on the shapes that segmentation networks have.
//!
//! `cargo run -p segdistill-ops --example conv_time [FILTER]` prints the least of several runs in milliseconds and the
//! rate that the multiply-adds give (forward 2 per MAC, with backward 6, or 4 where the image needs no gradient).
//! Nothing is checked here: `tests/conv.rs` does.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
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
    let filter = std::env::args().nth(1).unwrap_or_default();
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
        let x = ramp(&case.input)?;
        let x = if case.image { x } else { Var::from_tensor(&x)?.as_tensor().clone() };
        let frozen = ramp(&case.weight)?;
        let weight = Var::from_tensor(&frozen)?;
        let frozen_x = x.detach();
        let y = conv2d(&frozen_x, &frozen, None, case.cfg).map_err(candle_core::Error::wrap)?;
        let macs = (y.elem_count() * case.weight[1..].iter().product::<usize>()) as f64;
        let forward = least(|| conv2d(&frozen_x, &frozen, None, case.cfg).map(|_| ()))?;
        // Candle starts from a gradient of ones: nothing but the convolution and its two gradients is timed.
        let both = least(|| Ok(conv2d(&x, weight.as_tensor(), None, case.cfg)?.backward().map(|_| ())?))?;
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

fn ramp(shape: &[usize]) -> Result<Tensor> {
    let n = shape.iter().product::<usize>();
    Tensor::arange(0u32, n as u32, &Device::Cpu)?.to_dtype(DType::F32)?.affine(1.7, 0.3)?.sin()?.reshape(shape)
}

/// Seconds of the fastest of many runs, about a second in all.
fn least(mut run: impl FnMut() -> segdistill_ops::Result<()>) -> Result<f64> {
    let (mut best, begun, mut runs) = (f64::INFINITY, Instant::now(), 0);
    while runs < 5 || (begun.elapsed().as_secs_f64() < 1.0 && runs < 200) {
        let start = Instant::now();
        run().map_err(candle_core::Error::wrap)?;
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    Ok(best)
}
