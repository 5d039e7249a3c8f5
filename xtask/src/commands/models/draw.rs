//! `models draw`: block diagrams of networks from their plans, as SVG.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;

use segdistill_eval::table::write_atomic;
use segdistill_models::{ModelSpec, info, pyramid, trace};

use super::{count_text, macs_text, parts};

/// Networks of the page, each with the encoder its publication has.
const DRAWN: [&str; 9] = [
    "fcn8s-vgg16",
    "segnet-vgg16-bn",
    "unet-unet-bn",
    "unet-resnet34",
    "pspnet-resnet18-deep",
    "deeplabv3-resnet18-deep",
    "deeplabv3plus-resnet34",
    "segformer-mit-b0",
    "fcn-resnet50",
];
const HW: [usize; 2] = [512, 512];
const N_CLASSES: usize = 19;

/// Width of a map's column, in pixels of the figure.
const COLUMN: f64 = 92.0;
/// Height of the image; a map's is that over the square root of its stride, so that the smallest can still be seen.
const TALL: f64 = 150.0;
/// Where all maps have their middle.
const MIDDLE: f64 = 190.0;
const ENCODER: &str = "#4f7cac";
const DECODER: &str = "#c0632f";
const OTHER: &str = "#6b6b6b";

pub(super) fn run(out: &Path) -> Result<()> {
    fs_err::create_dir_all(out)?;
    for name in DRAWN {
        write_atomic(&out.join(format!("{name}.svg")), network(name)?.as_bytes())?;
    }
    for (name, svg) in parts::figures()? {
        write_atomic(&out.join(format!("part-{name}.svg")), svg.as_bytes())?;
    }
    println!("{} figures in {}", DRAWN.len() + parts::N_FIGURES, out.display());
    Ok(())
}

/// A map as it is drawn.
struct Block {
    name: String,
    channels: usize,
    hw: [usize; 2],
    color: &'static str,
}

impl Block {
    fn height(&self) -> f64 {
        TALL * (self.hw[0] as f64 / HW[0] as f64).sqrt()
    }

    /// Thicker with more channels, by their logarithm.
    fn thickness(&self) -> f64 {
        6.0 + 4.0 * (self.channels as f64).log2()
    }
}

/// The middle of column `i`.
fn x_of(i: usize) -> f64 {
    COLUMN * (i as f64 + 0.5) + 10.0
}

/// The diagram of the network `name` at 512x512 and 19 classes.
fn network(name: &str) -> Result<String> {
    let mut spec = ModelSpec::named(name, N_CLASSES)?;
    if ["pspnet", "deeplabv3", "fcn"].contains(&spec.name.as_str()) {
        spec.output_stride = 8;
    }
    let (about, trace, maps) = (info(&spec)?, trace(&spec, HW)?, pyramid(&spec, HW)?);
    let block = |name: &str, channels, hw, color| Block { name: name.to_string(), channels, hw, color };
    let mut blocks = vec![block("image", 3, HW, OTHER)];
    // Columns of the maps the decoder reads besides the deepest, and of those whose pooling it undoes.
    let (mut skips, mut unpooled) = (Vec::new(), Vec::new());
    for (i, map) in maps.iter().enumerate() {
        if map.read_as.is_some() && i + 1 < maps.len() {
            skips.push(blocks.len());
        }
        if map.unpooled {
            unpooled.push(blocks.len());
        }
        blocks.push(block(map.tap.name, map.tap.channels, map.hw, ENCODER));
    }
    let own = about.taps.iter().zip(&trace.tap_sizes).skip(maps.iter().filter(|m| m.read_as.is_some()).count());
    for (tap, hw) in own {
        blocks.push(block(tap.name, tap.channels, *hw, DECODER));
    }
    blocks.push(block("logits", N_CLASSES, trace.logits_hw, DECODER));
    let last = blocks.len() - 1;

    let width = COLUMN * blocks.len() as f64 + 20.0;
    let mut svg = open(width, 330.0);
    let title = format!(
        "{name}: {} parameters, {} at 512x512, {N_CLASSES} classes",
        count_text(about.n_parameters as u64),
        macs_text(trace.macs)
    );
    text(&mut svg, 12.0, 22.0, "start", 14, &title);
    for (i, block) in blocks.iter().enumerate() {
        let (h, w) = (block.height(), block.thickness());
        let (x, y) = (x_of(i) - w / 2.0, MIDDLE - h / 2.0);
        let _ = writeln!(
            svg,
            r#"<rect x="{x:.1}" y="{y:.1}" width="{w:.1}" height="{h:.1}" rx="2" fill="{}"/>"#,
            block.color
        );
        text(&mut svg, x_of(i), 286.0, "middle", 12, &block.name);
        let shape = format!("{} x {}x{}", block.channels, block.hw[0], block.hw[1]);
        text(&mut svg, x_of(i), 302.0, "middle", 10, &shape);
        if i > 0 {
            let (from, to) = (x_of(i - 1) + blocks[i - 1].thickness() / 2.0 + 3.0, x - 5.0);
            arrow(&mut svg, &format!("M{from:.1} {MIDDLE} L{to:.1} {MIDDLE}"), OTHER, false);
        }
    }
    // A skip goes over the maps between, to the first of the decoder's maps that is as fine as itself.
    for (joined, dashed) in [(&skips, false), (&unpooled, true)] {
        for (k, &from) in joined.iter().enumerate() {
            let fine = |to: &usize| blocks[*to].hw[0] >= blocks[from].hw[0];
            let to = (1 + maps.len()..blocks.len()).find(fine).unwrap_or(last);
            let (x0, y0) = (x_of(from), MIDDLE - blocks[from].height() / 2.0 - 3.0);
            let spread = 10.0 * (k as f64 - (joined.len() as f64 - 1.0) / 2.0);
            let (x1, y1) = (x_of(to) - spread, MIDDLE - blocks[to].height() / 2.0 - 5.0);
            let top = 44.0 + 7.0 * k as f64;
            let path = format!("M{x0:.1} {y0:.1} C{x0:.1} {top:.1} {x1:.1} {top:.1} {x1:.1} {y1:.1}");
            arrow(&mut svg, &path, DECODER, dashed);
        }
    }
    let indices = if unpooled.is_empty() { "" } else { "; dashed: places of the maxima" };
    let key = format!("blue: encoder; orange: decoder, and what it takes besides the deepest map{indices}");
    text(&mut svg, 12.0, 322.0, "start", 11, &key);
    svg.push_str("</svg>\n");
    Ok(svg)
}

/// The beginning of a figure: size, white ground, an arrow's head.
pub(super) fn open(width: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
         height=\"{height:.0}\" font-family=\"sans-serif\">\n\
         <defs><marker id=\"tip\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" \
         orient=\"auto\"><path d=\"M0 0 L8 4 L0 8 z\" fill=\"#333333\"/></marker></defs>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    )
}

/// A line of text; `anchor` is start, middle or end.
pub(super) fn text(svg: &mut String, x: f64, y: f64, anchor: &str, size: usize, content: &str) {
    let _ = writeln!(
        svg,
        r##"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-size="{size}" fill="#222222">{content}</text>"##
    );
}

/// A line with a head at its end.
pub(super) fn arrow(svg: &mut String, path: &str, color: &str, dashed: bool) {
    let dashes = if dashed { r#" stroke-dasharray="5 4""# } else { "" };
    let _ = writeln!(
        svg,
        r#"<path d="{path}" fill="none" stroke="{color}" stroke-width="1.4"{dashes} marker-end="url(#tip)"/>"#
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_drawn_and_says_what_the_plan_says() {
        for name in DRAWN {
            let svg = network(name).unwrap();
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{name}");
            let spec = ModelSpec::named(name, N_CLASSES).unwrap();
            let n_maps = pyramid(&spec, HW).unwrap().len();
            assert!(svg.matches("<rect").count() >= n_maps + 3, "{name}");
            assert!(svg.contains(&count_text(info(&spec).unwrap().n_parameters as u64)), "{name}");
        }
        assert_eq!(parts::figures().unwrap().len(), parts::N_FIGURES);
    }
}
