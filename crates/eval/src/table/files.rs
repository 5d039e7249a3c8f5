//! Tables as files: CSV, Parquet and JSON, written whole or not at all.

use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use polars::prelude::{
    CsvReadOptions, CsvWriter, DataFrame, DataType, JsonFormat, JsonReader, JsonWriter, ParquetReader, ParquetWriter,
    Schema, SerReader, SerWriter,
};

use crate::error::{EvalError, Result};

/// Columns that hold text even where every value looks like a number.
const TEXT_COLUMNS: [&str; 8] = ["method", "role", "encoder", "split", "class", "stage", "ground_truth", "run"];

/// Writes a file whole or not at all: to a fresh file in the same folder, synced, then renamed over `path`.
///
/// The folder is created if need be. A reader sees the old content or the new one, never a part.
///
/// # Errors
/// `Io` naming the file; the old content is untouched and nothing is left behind.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
        return Err(EvalError::config(format!("`{}` names no file", path.display()), "pass the path of a file"));
    };
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs_err::create_dir_all(folder)?;
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    let fresh = folder.join(format!(".{name}.{}-{n}.tmp", std::process::id()));
    let written = (|| -> Result<()> {
        let mut file = fs_err::OpenOptions::new().write(true).create_new(true).open(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs_err::rename(&fresh, path)?;
        // The rename itself is on disk only once the folder is.
        Ok(fs_err::File::open(folder)?.sync_all()?)
    })();
    if written.is_err() {
        // The first error is the one to report; the fresh file may not even exist.
        let _ = fs_err::remove_file(&fresh);
    }
    written
}

/// Writes a frame as comma-separated values with a header; nulls are empty fields, numbers keep every digit.
pub fn write_csv(frame: &DataFrame, path: &Path) -> Result<()> {
    let mut bytes = Vec::new();
    CsvWriter::new(&mut bytes).include_header(true).finish(&mut frame.clone())?;
    write_atomic(path, &bytes)
}

/// Writes a frame as Parquet.
pub fn write_parquet(frame: &DataFrame, path: &Path) -> Result<()> {
    let mut bytes = Vec::new();
    ParquetWriter::new(&mut bytes).finish(&mut frame.clone())?;
    write_atomic(path, &bytes)
}

/// Writes a frame as a JSON array of one object a row.
pub fn write_json(frame: &DataFrame, path: &Path) -> Result<()> {
    let mut bytes = Vec::new();
    JsonWriter::new(&mut bytes).with_json_format(JsonFormat::Json).finish(&mut frame.clone())?;
    bytes.push(b'\n');
    write_atomic(path, &bytes)
}

/// Writes `stem.csv`, `stem.parquet` and `stem.json`; returns the three paths.
pub fn write_all(frame: &DataFrame, stem: &Path) -> Result<[PathBuf; 3]> {
    let [csv, parquet, json] = ["csv", "parquet", "json"].map(|extension| {
        let mut path = stem.as_os_str().to_owned();
        path.push(format!(".{extension}"));
        PathBuf::from(path)
    });
    write_csv(frame, &csv)?;
    write_parquet(frame, &parquet)?;
    write_json(frame, &json)?;
    Ok([csv, parquet, json])
}

/// Reads a CSV file with a header, as `metrics.csv`; column types are inferred from the whole file, columns of names
/// (method, role, encoder, split, class, stage, run) are always text.
///
/// # Errors
/// `Io` when the file cannot be read, `Table` naming it when it is no CSV.
pub fn read_csv(path: &Path) -> Result<DataFrame> {
    let bytes = fs_err::read(path)?;
    let header = bytes.split(|&b| b == b'\n').next().unwrap_or_default();
    let header = String::from_utf8_lossy(header);
    let names: Vec<&str> = header.trim().split(',').map(|n| n.trim_matches('"')).collect();
    let text: Schema =
        TEXT_COLUMNS.iter().filter(|n| names.contains(n)).map(|n| ((*n).into(), DataType::String)).collect();
    CsvReadOptions::default()
        .with_has_header(true)
        .with_infer_schema_length(None)
        .with_schema_overwrite(Some(Arc::new(text)))
        .into_reader_with_file_handle(Cursor::new(bytes))
        .finish()
        .map_err(|e| EvalError::table(path, e.to_string()))
}

/// Reads a Parquet file.
///
/// # Errors
/// As [`read_csv`].
pub fn read_parquet(path: &Path) -> Result<DataFrame> {
    let bytes = fs_err::read(path)?;
    ParquetReader::new(Cursor::new(bytes)).finish().map_err(|e| EvalError::table(path, e.to_string()))
}

/// Reads a JSON array of objects.
///
/// # Errors
/// As [`read_csv`].
pub fn read_json(path: &Path) -> Result<DataFrame> {
    let bytes = fs_err::read(path)?;
    JsonReader::new(Cursor::new(bytes))
        .with_json_format(JsonFormat::Json)
        .infer_schema_len(None)
        .finish()
        .map_err(|e| EvalError::table(path, e.to_string()))
}

/// Reads a table by its extension: csv, parquet or json.
///
/// # Errors
/// As [`read_csv`]; `Table` for another extension.
pub fn read_table(path: &Path) -> Result<DataFrame> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("csv") => read_csv(path),
        Some("parquet") => read_parquet(path),
        Some("json") => read_json(path),
        other => Err(EvalError::table(path, format!("extension {other:?} is none of csv, parquet, json"))),
    }
}
