//! Pictures for the page: error maps, and PNG data URIs.

use crate::error::{EvalError, Result};

/// An RGB picture, row-major, interleaved, `3 * h * w` bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RgbBytes {
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Red, green and blue of each pixel.
    pub rgb: Vec<u8>,
}

/// Colour of a right pixel in an error map.
pub const ERROR_RIGHT: [u8; 3] = [238, 240, 243];
/// Colour of a wrong pixel in an error map.
pub const ERROR_WRONG: [u8; 3] = [200, 24, 48];
/// Colour of a void pixel in an error map.
pub const ERROR_VOID: [u8; 3] = [150, 154, 160];

/// Where a prediction differs from the labels: [`ERROR_WRONG`], [`ERROR_RIGHT`], and [`ERROR_VOID`] where the label is
/// `void`.
///
/// # Shapes
/// `labels`, `predictions`: row-major maps of `hw[0] * hw[1]` pixels.
/// # Errors
/// `Shape` when a map has another number of pixels.
/// # Example
/// ```
/// use segdistill_eval::report::{ERROR_RIGHT, ERROR_VOID, ERROR_WRONG, error_map};
/// let map = error_map(&[0, 1, 255], &[0, 0, 0], [1, 3], 255)?;
/// assert_eq!(map.rgb, [ERROR_RIGHT, ERROR_WRONG, ERROR_VOID].concat());
/// # Ok::<(), segdistill_eval::EvalError>(())
/// ```
pub fn error_map(labels: &[u8], predictions: &[u8], hw: [usize; 2], void: u8) -> Result<RgbBytes> {
    let [h, w] = hw;
    if labels.len() != h * w || predictions.len() != h * w {
        return Err(EvalError::shape(
            "error map",
            format!("{} labels and {} predictions", labels.len(), predictions.len()),
            format!("{h}x{w} of each"),
            "predict at the size of the label map",
        ));
    }
    let color = |(label, prediction): (&u8, &u8)| match (label, prediction) {
        (l, _) if *l == void => ERROR_VOID,
        (l, p) if l == p => ERROR_RIGHT,
        _ => ERROR_WRONG,
    };
    Ok(RgbBytes { h, w, rgb: labels.iter().zip(predictions).flat_map(color).collect() })
}

impl RgbBytes {
    /// The picture as a PNG file; label maps and others of at most 256 colours are stored with a palette.
    ///
    /// # Errors
    /// `Shape` when the bytes are not `3 * h * w`, or there are none.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        if self.rgb.is_empty() || self.rgb.len() != 3 * self.h * self.w {
            return Err(EvalError::shape(
                "picture",
                format!("{} bytes", self.rgb.len()),
                format!("3 x {} x {}", self.h, self.w),
                "pass red, green and blue of every pixel",
            ));
        }
        let mut png = Vec::new();
        let (w, h) = (self.w as u32, self.h as u32);
        let mut encoder = png::Encoder::new(&mut png, w, h);
        encoder.set_depth(png::BitDepth::Eight);
        encoder.set_compression(png::Compression::High);
        let written = match indexed(&self.rgb) {
            Some((palette, indices)) => {
                encoder.set_color(png::ColorType::Indexed);
                encoder.set_palette(palette);
                encoder.set_filter(png::Filter::NoFilter);
                encoder.write_header().and_then(|mut writer| writer.write_image_data(&indices))
            }
            None => {
                encoder.set_color(png::ColorType::Rgb);
                encoder.set_filter(png::Filter::Adaptive);
                encoder.write_header().and_then(|mut writer| writer.write_image_data(&self.rgb))
            }
        };
        written.map_err(|e| EvalError::config(format!("a {h}x{w} picture as PNG: {e}"), "use a smaller picture"))?;
        Ok(png)
    }

    /// The picture as `data:image/png;base64,...`.
    ///
    /// # Errors
    /// As [`RgbBytes::to_png`].
    pub fn to_data_uri(&self) -> Result<String> {
        Ok(format!("data:image/png;base64,{}", base64(&self.to_png()?)))
    }
}

/// Palette (in order of first appearance) and index of every pixel, when 256 colours are enough.
fn indexed(rgb: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut colors = std::collections::HashMap::new();
    let mut palette = Vec::new();
    let mut indices = Vec::with_capacity(rgb.len() / 3);
    for pixel in rgb.chunks_exact(3) {
        let next = colors.len();
        let index = *colors.entry([pixel[0], pixel[1], pixel[2]]).or_insert(next);
        if index == next {
            if next == 256 {
                return None;
            }
            palette.extend_from_slice(pixel);
        }
        indices.push(index as u8);
    }
    Some((palette, indices))
}

/// RFC 4648 base64 with padding.
pub(super) fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().enumerate().fold(0u32, |word, (i, &b)| word | u32::from(b) << (16 - 8 * i));
        for i in 0..4 {
            // n bytes fill n + 1 characters.
            let filled = i <= chunk.len();
            out.push(if filled { char::from(ALPHABET[(word >> (18 - 6 * i) & 63) as usize]) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_as_in_rfc_4648() {
        let cases = ["", "f", "fo", "foo", "foob", "fooba", "foobar"];
        let expected = ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy"];
        assert_eq!(cases.map(|c| base64(c.as_bytes())), expected);
        assert_eq!(base64(&[0xfb, 0xff, 0xbf]), "+/+/");
    }

    fn decode(png: &[u8]) -> (png::ColorType, RgbBytes) {
        let info = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
        let stored = info.info().color_type;
        let mut decoder = png::Decoder::new(std::io::Cursor::new(png));
        decoder.set_transformations(png::Transformations::EXPAND);
        let mut reader = decoder.read_info().unwrap();
        let mut rgb = vec![0; reader.output_buffer_size().unwrap()];
        let frame = reader.next_frame(&mut rgb).unwrap();
        assert_eq!(frame.color_type, png::ColorType::Rgb);
        (stored, RgbBytes { h: frame.height as usize, w: frame.width as usize, rgb })
    }

    #[test]
    fn pictures_survive_both_encodings() {
        let mut few = RgbBytes { h: 5, w: 7, rgb: Vec::new() };
        few.rgb = (0..35).flat_map(|i| [[10, 20, 30], [200, 0, 1], [3, 3, 3]][i * i % 3]).collect();
        assert_eq!(decode(&few.to_png().unwrap()), (png::ColorType::Indexed, few.clone()));
        // 256 colours still have a palette, 257 do not.
        for (n, stored) in [(256usize, png::ColorType::Indexed), (257, png::ColorType::Rgb)] {
            let rgb = (0..n).flat_map(|i| [(i % 256) as u8, (i / 256) as u8, 9]).collect();
            let picture = RgbBytes { h: 1, w: n, rgb };
            assert_eq!(decode(&picture.to_png().unwrap()), (stored, picture));
        }
        few.rgb.pop();
        assert!(few.to_data_uri().is_err());
        assert!(RgbBytes::default().to_png().is_err());
    }
}
