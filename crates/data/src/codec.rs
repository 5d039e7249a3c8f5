//! Pictures and label maps from and to files, with limits on what a file may make the decoder allocate.
//!
//! Label files are read as raw indices: a palette is ignored, so that index 3 stays 3 whatever its colour.

use std::io::Cursor;
use std::path::Path;

use png::{BitDepth, ColorType, Transformations};

use crate::error::{DataError, Result};
use crate::sample::{LabelMap, RgbImage};

/// Largest height or width that is decoded, in pixels.
pub const MAX_SIDE: u32 = 8192;
/// Most memory a decoder may take, in bytes.
pub const MAX_DECODE_BYTES: u64 = 256 << 20;

/// Reads a PNG or JPEG file as 8-bit colour; grey is repeated over the channels, alpha is dropped, 16 bits are rounded to 8.
///
/// # Errors
/// `Io` naming the path; `Image` for a file that is truncated, damaged, of another kind, above 8192 pixels a side or
/// above 256 MiB.
pub fn read_image(path: &Path) -> Result<RgbImage> {
    let bytes = fs_err::read(path)?;
    let fail = |why: String| DataError::Image {
        path: path.into(),
        why,
        hint: "expected a whole PNG or JPEG of at most 8192x8192 pixels; obtain the file again",
    };
    let mut limits = image::Limits::default();
    limits.max_image_width = Some(MAX_SIDE);
    limits.max_image_height = Some(MAX_SIDE);
    limits.max_alloc = Some(MAX_DECODE_BYTES);
    let mut reader = image::ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    reader.limits(limits);
    let picture = reader.decode().map_err(|e| fail(e.to_string()))?.into_rgb8();
    Ok(RgbImage { height: picture.height() as usize, width: picture.width() as usize, rgb: picture.into_raw() })
}

/// Reads a label PNG as the raw values it holds: 8-bit grey, or palette indices of 1 to 8 bits.
///
/// # Errors
/// `Io` naming the path; `Image` for a file that is truncated, damaged, not a PNG or beyond the limits of
/// [`read_image`]; `LabelFormat` for colour, alpha, 16 bits or grey of fewer than 8 bits (whose values PNG scales).
pub fn read_labels(path: &Path) -> Result<LabelMap> {
    let bytes = fs_err::read(path)?;
    let fail = |why: String| DataError::Image {
        path: path.into(),
        why,
        hint: "expected a whole label PNG of at most 8192x8192 pixels; obtain the file again",
    };
    let mut decoder =
        png::Decoder::new_with_limits(Cursor::new(bytes), png::Limits { bytes: MAX_DECODE_BYTES as usize });
    decoder.set_transformations(Transformations::IDENTITY);
    let header = decoder.read_header_info().map_err(|e| fail(e.to_string()))?;
    let (width, height, color, depth) = (header.width, header.height, header.color_type, header.bit_depth);
    if width > MAX_SIDE || height > MAX_SIDE {
        return Err(fail(format!("{width}x{height} pixels are above the limit of {MAX_SIDE} a side")));
    }
    let bits = depth as usize;
    let raw = match color {
        ColorType::Grayscale => bits == 8,
        // A palette has at most 256 entries, so its indices have at most 8 bits.
        ColorType::Indexed => true,
        _ => false,
    };
    if !raw {
        return Err(DataError::LabelFormat {
            path: path.into(),
            found: format!("{color:?} pixels of {bits} bits, {}", size_text([height as usize, width as usize])),
            hint: "a picture of class colours is not a label file; save the ids, not their colours",
        });
    }
    let mut reader = decoder.read_info().map_err(|e| fail(e.to_string()))?;
    let size = reader.output_buffer_size().ok_or_else(|| fail("its size overflows".into()))?;
    let mut packed = vec![0; size];
    let frame = reader.next_frame(&mut packed).map_err(|e| fail(e.to_string()))?;
    if (frame.width, frame.height) != (width, height) {
        return Err(fail(format!("its first frame is {}x{} of {width}x{height}", frame.width, frame.height)));
    }
    let line = frame.line_size;
    // Up to the end of the file, so that a cut after the pixels is seen too.
    reader.finish().map_err(|e| fail(e.to_string()))?;
    let (height, width) = (height as usize, width as usize);
    let ids = if bits == 8 {
        packed
    } else {
        // Palette indices of fewer than 8 bits lie packed, the first pixel in the high bits.
        let unpack = |i: usize| {
            let (row, bit) = (i / width, i % width * bits);
            (packed[row * line + bit / 8] >> (8 - bits - bit % 8)) & ((1u16 << bits) - 1) as u8
        };
        (0..height * width).map(unpack).collect()
    };
    Ok(LabelMap { height, width, ids })
}

/// Height and width as they are written to people.
pub(crate) fn size_text(hw: [usize; 2]) -> String {
    format!("{}x{} (width x height)", hw[1], hw[0])
}

/// Writes a picture as an 8-bit RGB PNG.
///
/// # Errors
/// `Io` naming the path; `Shape` when the bytes do not fill the picture.
pub fn write_png(path: &Path, picture: &RgbImage) -> Result<()> {
    write(path, picture.height, picture.width, ColorType::Rgb, &picture.rgb)
}

/// Writes a label map as an 8-bit grey PNG whose values are the ids, void as 255.
///
/// # Errors
/// As [`write_png`].
pub fn write_label_png(path: &Path, labels: &LabelMap) -> Result<()> {
    write(path, labels.height, labels.width, ColorType::Grayscale, &labels.ids)
}

fn write(path: &Path, height: usize, width: usize, color: ColorType, data: &[u8]) -> Result<()> {
    let expected = height * width * color.samples();
    if data.len() != expected || expected == 0 {
        return Err(DataError::Shape {
            what: format!("writing `{}`", path.display()),
            found: format!("{} bytes", data.len()),
            expected: format!("{expected} for {width}x{height} pixels, at least one pixel"),
            hint: "height, width and data of a picture belong together",
        });
    }
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(color);
    encoder.set_depth(BitDepth::Eight);
    let fail = |e: png::EncodingError| DataError::Image {
        path: path.into(),
        why: e.to_string(),
        hint: "PNG takes pictures of up to 2^31 pixels a side",
    };
    let mut writer = encoder.write_header().map_err(fail)?;
    writer.write_image_data(data).map_err(fail)?;
    writer.finish().map_err(fail)?;
    Ok(fs_err::write(path, bytes)?)
}
