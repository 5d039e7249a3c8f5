//! Weight files as others write them: what PyTorch saved is read to the bit, and what would do harm is refused.
//!
//! The files in `fixtures/pth` were written by PyTorch (`make_pth.py` beside them); hostile ones are made here, byte by
//! byte.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use segdistill_models::weights::{FileFormat, WeightFile, read};
use zip::write::{SimpleFileOptions, ZipWriter};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pth").join(name)
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    let flat = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F32 => flat.to_vec1::<f32>().unwrap().iter().map(|v| v.to_bits().into()).collect(),
        DType::F64 => flat.to_vec1::<f64>().unwrap().iter().map(|v| v.to_bits()).collect(),
        DType::I64 => flat.to_vec1::<i64>().unwrap().iter().map(|v| *v as u64).collect(),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_same(found: &BTreeMap<String, Tensor>, expected: &BTreeMap<String, Tensor>) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, tensor) in found {
        let other = &expected[name];
        assert_eq!((tensor.dtype(), tensor.dims()), (other.dtype(), other.dims()), "{name}");
        assert_eq!(bits(tensor), bits(other), "{name}");
    }
}

#[test]
fn every_kind_of_tensor_is_read_to_the_bit() {
    let expected = read(fixture("plain.safetensors"), &Device::Cpu).unwrap();
    for (name, format) in [
        ("plain.pth", FileFormat::PytorchZip),
        ("protocol4.bin", FileFormat::PytorchZip),
        ("legacy.pth", FileFormat::PytorchLegacy),
        ("plain.safetensors", FileFormat::Safetensors),
    ] {
        let mut file = WeightFile::open(fixture(name), None).unwrap();
        assert_eq!((file.format(), file.key(), file.others().len()), (format, "", 0), "{name}");
        assert_same(&file.load(|_| true).unwrap(), &expected);
        let some = file.load(|tensor| tensor.starts_with("shared.")).unwrap();
        assert_eq!(some.len(), 4, "{name}");
    }
    let file = WeightFile::open(fixture("plain.pth"), None).unwrap();
    let listed = |name: &str| format!("{} {:?}", file.tensors()[name].dtype, file.tensors()[name].shape);
    assert_eq!(listed("half"), "F16 [3, 4]");
    assert_eq!(listed("bfloat"), "BF16 [3, 4]");
    assert_eq!(listed("shared.columns"), "F32 [2, 2]");
    assert_eq!(listed("empty"), "F32 [0, 3]");
    assert_eq!(listed("scalar"), "F32 []");
}

#[test]
fn a_state_dict_inside_a_checkpoint_is_found() {
    let expected = read(fixture("small.safetensors"), &Device::Cpu).unwrap();
    let mut nested = WeightFile::open(fixture("nested.ckpt"), None).unwrap();
    assert_eq!(nested.key(), "state_dict");
    let plain = |(name, tensor): (String, Tensor)| (name.strip_prefix("module.").unwrap().to_string(), tensor);
    assert_same(&nested.load(|_| true).unwrap().into_iter().map(plain).collect(), &expected);

    for key in ["teacher", "ema.weights"] {
        let mut twice = WeightFile::open(fixture("twice.pt"), Some(key)).unwrap();
        assert_same(&twice.load(|_| true).unwrap(), &expected);
    }
    let text = WeightFile::open(fixture("twice.pt"), None).unwrap_err().to_string();
    assert!(text.contains("no state dict found") && text.contains("`teacher`") && text.contains("--key"), "{text}");
    // A counter and a score are tensors too.
    let mut beside = WeightFile::open(fixture("beside.pth"), None).unwrap();
    assert_eq!(beside.key(), "state_dict");
    assert_same(&beside.load(|_| true).unwrap(), &expected);
    let text = WeightFile::open(fixture("twice.pt"), Some("ema.model")).unwrap_err().to_string();
    assert!(text.contains("`model`") && text.contains("`weights`"), "{text}");

    let parameters = WeightFile::open(fixture("parameters.pth"), None).unwrap();
    assert_eq!(parameters.others(), ["note (a text)"]);
    assert_eq!(parameters.tensors().len(), 5);
}

#[test]
fn what_a_checkpoint_keeps_beside_its_weights_is_passed_over() {
    let expected = read(fixture("small.safetensors"), &Device::Cpu).unwrap();
    for name in ["odd.pth", "odd4.pth"] {
        let mut odd = WeightFile::open(fixture(name), None).unwrap();
        assert_eq!(odd.key(), "state_dict", "{name}");
        assert_same(&odd.load(|_| true).unwrap(), &expected);
    }
    // Among the tensors, too; whoever needs one of them finds it missing.
    let mut kinds = WeightFile::open(fixture("kinds.pth"), None).unwrap();
    assert_same(&kinds.load(|_| true).unwrap(), &expected);
    let others = kinds.others().join(", ");
    for said in ["complex (", "torch.ComplexFloatStorage", "unsigned (", "sparse (", "nothing was executed"] {
        assert!(others.contains(said), "does not say `{said}`: {others}");
    }
}

#[test]
fn the_older_form_is_read_in_every_binary_protocol() {
    let expected = read(fixture("small.safetensors"), &Device::Cpu).unwrap();
    let mut file = WeightFile::open(fixture("legacy4.pth"), None).unwrap();
    assert_eq!(file.format(), FileFormat::PytorchLegacy);
    assert_same(&file.load(|_| true).unwrap(), &expected);
    assert_refused(&fixture("protocol0.pth"), &["instruction 0x", "protocol 0 or 1", "torch.save's default"]);
}

#[test]
fn names_below_a_prefix_are_asked_for() {
    let file = WeightFile::open(fixture("nested.ckpt"), None).unwrap();
    assert_eq!(file.prefix(), "");
    assert_eq!(file.below("module.").unwrap().prefix(), "module.");
    let file = WeightFile::open(fixture("nested.ckpt"), None).unwrap();
    let text = file.below("student.").unwrap_err().to_string();
    assert!(text.contains("no name begins with `student.`") && text.contains("`module."), "{text}");
}

/// Opens and reads `path` under an ending of its own, which must fail in time, naming the file and what it says.
#[track_caller]
fn assert_refused(path: &Path, said: &[&str]) {
    let started = Instant::now();
    let error = WeightFile::open(path, None).and_then(|mut file| file.load(|_| true)).unwrap_err();
    let took = started.elapsed();
    let text = error.to_string();
    assert!(took < Duration::from_secs(1), "{took:?}: {text}");
    assert!(text.contains(&path.display().to_string()) && text.contains("hint: "), "{text}");
    assert!(text.len() < 2000 && text.chars().all(|c| c == '\n' || !c.is_control()), "{text}");
    for word in said {
        assert!(text.contains(word), "does not say `{word}`: {text}");
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs_err::write(&path, bytes).unwrap();
        path
    }
}

#[test]
fn a_checkpoint_cut_anywhere_is_refused() {
    let folder = Folder::new();
    for name in ["plain.pth", "legacy.pth", "plain.safetensors"] {
        let whole = fs_err::read(fixture(name)).unwrap();
        for len in (0..whole.len()).step_by(97).chain([7, 8, 9, whole.len() - 1]) {
            assert_refused(&folder.file(name, &whole[..len]), &[]);
        }
        let mut grown = whole.clone();
        grown.extend([0; 5]);
        assert_refused(&folder.file(name, &grown), &[]);
    }
    let whole = fs_err::read(fixture("plain.pth")).unwrap();
    assert_refused(&folder.file("cut.pth", &whole[..whole.len() / 2]), &["the end", "cut short"]);
}

#[test]
fn a_flipped_bit_never_ends_the_program_and_never_changes_a_number_unseen() {
    let folder = Folder::new();
    let whole = fs_err::read(fixture("plain.pth")).unwrap();
    let expected = read(fixture("plain.safetensors"), &Device::Cpu).unwrap();
    for at in (0..whole.len()).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        let path = folder.file("flipped.pth", &bytes);
        // Padding and time stamps hold nothing; whatever is read must be right.
        if let Ok(found) = WeightFile::open(&path, None).and_then(|mut file| file.load(|_| true)) {
            assert_same(&found, &expected);
        }
    }
    for at in (0..1500).step_by(3) {
        let mut bytes = fs_err::read(fixture("legacy.pth")).unwrap();
        bytes[at] ^= 1 << (at % 8);
        let path = folder.file("flipped-legacy.pth", &bytes);
        let _ = WeightFile::open(&path, None).and_then(|mut file| file.load(|_| true));
    }
}

/// Bytes of a safetensors file with this header and so many bytes of data.
fn safetensors(header: &str, n_data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(vec![0; n_data]);
    out
}

#[test]
fn safetensors_headers_that_lie_are_refused() {
    let folder = Folder::new();
    let one =
        |shape: &str, from: u64, to: u64| format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}"#);
    let two = |a: String, b: String| format!(r#"{{"first":{a},"second":{b}}}"#);
    let deep = "[".repeat(100_000);
    let many: Vec<String> = (0..400_000).map(|i| format!(r#""{i}":{}"#, one("[0]", 0, 0))).collect();
    let thousands = many[..20_001].join(",");
    for (name, bytes, said) in [
        (
            "overlap",
            safetensors(&two(one("[4]", 0, 16), one("[4]", 8, 24)), 24),
            vec!["`second`", "overlap", "`first`"],
        ),
        ("same bytes", safetensors(&two(one("[4]", 0, 16), one("[4]", 0, 16)), 16), vec!["overlap"]),
        ("gap", safetensors(&two(one("[4]", 0, 16), one("[4]", 20, 36)), 36), vec!["`second`", "gap"]),
        (
            "left over",
            safetensors(&format!(r#"{{"a":{}}}"#, one("[4]", 0, 16)), 20),
            vec!["4 bytes belong to no tensor"],
        ),
        ("short", safetensors(&format!(r#"{{"a":{}}}"#, one("[4]", 0, 16)), 12), vec!["`a`", "bytes 0 to 16 of 12"]),
        ("shape", safetensors(&format!(r#"{{"a":{}}}"#, one("[5]", 0, 16)), 16), vec!["`a`", "do not fit"]),
        (
            "huge shape",
            safetensors(&format!(r#"{{"a":{}}}"#, one("[4294967296,4294967296,4]", 0, 16)), 16),
            vec!["`a`", "do not fit"],
        ),
        ("huge offsets", safetensors(&format!(r#"{{"a":{}}}"#, one("[0]", u64::MAX, u64::MAX)), 0), vec!["`a`"]),
        ("backwards", safetensors(&format!(r#"{{"a":{}}}"#, one("[4]", 16, 0)), 16), vec!["do not fit"]),
        ("twice", safetensors(&format!(r#"{{"a":{0},"a":{0}}}"#, one("[0]", 0, 0)), 0), vec!["`a`", "twice"]),
        ("type", safetensors(r#"{"a":{"dtype":"Q7","shape":[],"data_offsets":[0,4]}}"#, 4), vec!["`Q7`"]),
        ("negative", safetensors(&format!(r#"{{"a":{}}}"#, one("[-4]", 0, 16)), 16), vec!["the header"]),
        ("deep", safetensors(&format!(r#"{{"a":{deep}}}"#), 0), vec!["the header"]),
        ("no json", safetensors("{\"a\": \u{1b}[31m}", 0), vec!["the header"]),
        ("metadata", safetensors(r#"{"__metadata__":{"a":{"b":1}}}"#, 0), vec!["the header"]),
        ("many", safetensors(&format!("{{{}}}", many.join(",")), 0), vec!["at most"]),
        ("thousands", safetensors(&format!("{{{thousands}}}"), 0), vec!["20001 tensors", "at most 20000"]),
        ("longer than the file", [&u64::MAX.to_le_bytes()[..], b"{}"].concat(), vec!["cut short"]),
        ("short length", vec![1, 2, 3], vec!["3 bytes"]),
    ] {
        assert_refused(&folder.file(&format!("{name}.safetensors"), &bytes), &said);
    }
}

#[test]
fn a_file_is_what_its_ending_says() {
    let folder = Folder::new();
    let pth = fs_err::read(fixture("plain.pth")).unwrap();
    let legacy = fs_err::read(fixture("legacy.pth")).unwrap();
    let plain = fs_err::read(fixture("plain.safetensors")).unwrap();
    assert_refused(&folder.file("renamed.safetensors", &pth), &["byte 0", "is a zip archive", ".pth"]);
    assert_refused(&folder.file("legacy.safetensors", &legacy), &["is a pickle"]);
    assert_refused(&folder.file("renamed.pth", &plain), &["byte 0", "ends in .pth", "is a safetensors file", "ending"]);
    assert_refused(&folder.file("weights.h5", &plain), &["`.h5`"]);
    assert_refused(&folder.file("weights", &plain), &["its name"]);
    assert_refused(&folder.file("page.pth", b"<!doctype html><html>not found"), &["begins with"]);
    assert_refused(&folder.file("empty.pth", b""), &["is empty"]);
    let mut tar = vec![0; 1024];
    tar[257..262].copy_from_slice(b"ustar");
    assert_refused(&folder.file("old.pth.tar", &tar), &["tar archive"]);
    assert_refused(folder.0.path(), &["no plain file"]);
    assert_refused(&folder.0.path().join("absent.pth"), &["absent.pth"]);
    let text = WeightFile::open(fixture("plain.safetensors"), Some("model")).unwrap_err().to_string();
    assert!(text.contains("--key"), "{text}");
}

/// A zip archive of stored entries.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in entries {
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// A checkpoint around a pickle, with one storage `0` of 16 bytes.
fn checkpoint(pickle: &[u8]) -> Vec<u8> {
    archive(&[("archive/data.pkl", pickle), ("archive/byteorder", b"little"), ("archive/data/0", &[0; 16])])
}

fn text(value: &str) -> Vec<u8> {
    [b"X".to_vec(), (value.len() as u32).to_le_bytes().to_vec(), value.as_bytes().to_vec()].concat()
}

fn numbers(values: &[i64]) -> Vec<u8> {
    let one = |v: &i64| [vec![0x8a, 8], v.to_le_bytes().to_vec()].concat();
    [b"(".to_vec(), values.iter().flat_map(one).collect(), b"t".to_vec()].concat()
}

/// `{"w": a tensor}`: a storage of `len` floats under `key`, seen from `offset` with shape and strides.
fn tensor_pickle(key: &str, len: i64, offset: i64, shape: &[i64], strides: &[i64]) -> Vec<u8> {
    let number = |v: i64| [vec![0x8a, 8], v.to_le_bytes().to_vec()].concat();
    [
        b"\x80\x02}".to_vec(),
        text("w"),
        b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\n".to_vec(),
        text(key),
        text("cpu"),
        number(len),
        b"tQ".to_vec(),
        number(offset),
        numbers(shape),
        numbers(strides),
        b"\x89ccollections\nOrderedDict\n)RtRs.".to_vec(),
    ]
    .concat()
}

#[test]
fn a_pickle_made_here_is_read() {
    let folder = Folder::new();
    let path = folder.file("made.pth", &checkpoint(&tensor_pickle("0", 4, 1, &[3], &[1])));
    assert_eq!(WeightFile::open(&path, None).unwrap().load(|_| true).unwrap()["w"].dims(), [3]);
    let path = folder.file("broadcast.pth", &checkpoint(&tensor_pickle("0", 4, 0, &[2, 2], &[0, 1])));
    assert_eq!(WeightFile::open(&path, None).unwrap().load(|_| true).unwrap()["w"].dims(), [2, 2]);
}

#[test]
fn tensors_that_claim_more_than_their_storage_are_refused() {
    let folder = Folder::new();
    let huge = i64::MAX;
    for (name, key, len, offset, shape, strides, said) in [
        ("beyond", "0", 4, 2, vec![3], vec![1], "storage of 4 elements"),
        ("strided", "0", 4, 0, vec![2, 2], vec![3, 1], "storage of 4 elements"),
        ("repeated", "0", 4, 0, vec![1 << 40], vec![0], "storage of 4 elements"),
        ("overflow", "0", 4, 0, vec![1 << 40, 1 << 40], vec![0, 0], "storage of 4 elements"),
        ("strides overflow", "0", 4, 0, vec![2, 2], vec![huge, huge], "storage of 4 elements"),
        ("offset", "0", 4, huge, vec![1], vec![1], "storage of 4 elements"),
        ("negative", "0", 4, 0, vec![-1], vec![1], "-1"),
        ("negative stride", "0", 4, 3, vec![4], vec![-1], "-1"),
        ("ranks", "0", 4, 0, vec![2, 2], vec![1], "strides [1]"),
        ("long storage", "0", 1 << 40, 0, vec![1 << 40], vec![1], "a file of"),
        ("longest storage", "0", huge, 0, vec![4], vec![1], "elements"),
        ("wrong length", "0", 3, 0, vec![3], vec![1], "archive/data/0"),
        ("longer than there", "0", 5, 0, vec![5], vec![1], "20"),
        ("absent", "1", 4, 0, vec![4], vec![1], "archive/data/1"),
        ("path", "../0", 4, 0, vec![4], vec![1], "storage key `../0`"),
        ("absolute", "/etc/passwd", 4, 0, vec![4], vec![1], "storage key"),
        ("escape", "0\u{1b}[31m", 4, 0, vec![4], vec![1], "storage key"),
    ] {
        let pickle = tensor_pickle(key, len, offset, &shape, &strides);
        assert_refused(&folder.file(&format!("{name}.pth"), &checkpoint(&pickle)), &[said]);
    }
}

#[test]
fn pickles_that_would_run_something_are_refused_by_name() {
    let folder = Folder::new();
    let marker = folder.0.path().join("executed");
    let command = text(&format!("touch {}", marker.display()));
    let system = |global: &[u8]| [b"\x80\x02".to_vec(), global.to_vec(), command.clone(), b"\x85R.".to_vec()].concat();
    let stack_global =
        [b"\x80\x04".to_vec(), text("os"), text("system"), vec![0x93], command.clone(), b"\x85R.".to_vec()];
    let instance = [b"(".to_vec(), command.clone(), b"ios\nsystem\n.".to_vec()].concat();
    for (name, pickle, said) in [
        ("system", system(b"cos\nsystem\n"), "`os.system`"),
        ("posix", system(b"cposix\nsystem\n"), "`posix.system`"),
        ("eval", system(b"c__builtin__\neval\n"), "`__builtin__.eval`"),
        ("load", system(b"ctorch.storage\n_load_from_bytes\n"), "_load_from_bytes"),
        ("getattr", system(b"cbuiltins\ngetattr\n"), "`builtins.getattr`"),
        ("protocol 4", stack_global.concat(), "`os.system`"),
        ("instance", instance, "instruction 0x69"),
        ("extension", b"\x80\x02\x82\x01.".to_vec(), "instruction 0x82"),
        ("text persistent id", b"P../../x\n.".to_vec(), "instruction 0x50"),
        ("escape", system(b"cos\x1b[31m\nsystem\n"), "`os"),
    ] {
        assert_refused(&folder.file(&format!("{name}.pth"), &checkpoint(&pickle)), &["entry `archive/data.pkl`", said]);
        // The older form, whose third pickle it would be.
        let legacy =
            [b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec(), b"\x80\x02M\xe9\x03.".to_vec(), pickle].concat();
        assert_refused(&folder.file(&format!("{name}-legacy.pth"), &legacy), &[said]);
    }
    assert_refused(&fixture("module.pth"), &["__main__.Small", "state_dict"]);
    assert!(!marker.exists());
}

#[test]
fn pickles_that_would_grow_are_refused_in_bounded_memory() {
    let folder = Folder::new();
    // Each level holds the one before it twice: 2^60 leaves if it were copied.
    let mut doubling = b"\x80\x02]q\x00".to_vec();
    for level in 1..60u8 {
        doubling.extend([b'h', level - 1, b'h', level - 1, 0x86, b'q', level]);
    }
    doubling.push(b'.');
    let nested = |open: &[u8], n: usize, close: &[u8]| {
        [b"\x80\x02".to_vec(), open.repeat(n), close.repeat(n), b".".to_vec()].concat()
    };
    let huge_text = [b"\x80\x02X".to_vec(), u32::MAX.to_le_bytes().to_vec(), b"abc.".to_vec()].concat();
    let huge_long = [b"\x80\x02\x8b".to_vec(), u32::MAX.to_le_bytes().to_vec(), b"abc.".to_vec()].concat();
    // A long list copied into a dictionary again and again.
    let mut copies = [b"\x80\x02}q\x00(".to_vec(), b"K\x01K\x02".repeat(1000), b"u".to_vec()].concat();
    for _ in 0..100_000 {
        copies.extend(b"ccollections\nOrderedDict\nh\x00\x85R");
    }
    copies.push(b'.');
    let itself = b"\x80\x02]q\x00h\x00a.".to_vec();
    for (name, pickle, said) in [
        ("doubling", doubling, "no state dict found"),
        ("deep tuples", nested(b")", 1, &b"\x85".repeat(900_000)), "no state dict found"),
        ("deep marks", nested(b"(", 900_000, b"t"), "no state dict found"),
        ("too many marks", nested(b"(", 2_000_000, b""), "marks"),
        ("too many values", nested(b")", 2_000_000, b""), "values"),
        ("too many steps", nested(b"N\x85", 3_000_000, b""), "more than"),
        ("text", huge_text, "4294967295 bytes are announced"),
        ("number", huge_long, "a whole number of 4294967295 bytes"),
        ("copies", copies, "copied items"),
        ("itself", itself, "no state dict found"),
        ("empty stack", b"\x80\x02\x85.".to_vec(), "empty stack"),
        ("mark", b"\x80\x02t.".to_vec(), "mark"),
        ("memory", b"\x80\x02h\x07.".to_vec(), "recalled"),
        ("protocol", b"\x80\x09.".to_vec(), "protocol 9"),
        ("without end", b"\x80\x02N".to_vec(), "ends before"),
        ("odd", b"\x80\x02}(NNNu.".to_vec(), "key without a value"),
        ("call", b"\x80\x02NN\x85R.".to_vec(), "is called"),
        ("arguments", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.".to_vec(), "called with 0 values"),
        ("nothing", b".".to_vec(), "empty stack"),
    ] {
        assert_refused(&folder.file(&format!("{name}.pth"), &checkpoint(&pickle)), &[said]);
    }
}

#[test]
fn archives_that_are_no_checkpoints_are_refused() {
    let folder = Folder::new();
    let good = tensor_pickle("0", 4, 0, &[4], &[1]);
    let storage: &[u8] = &[0; 16];
    for (name, bytes, said) in [
        (
            "photos",
            archive(&[("a.png", b"x"), ("b/c.txt", b"y")]),
            vec!["2 entries", "`a.png`", "no PyTorch checkpoint"],
        ),
        ("nothing", archive(&[]), vec!["0 entries"]),
        ("two", archive(&[("a/data.pkl", &good), ("b/data.pkl", &good)]), vec!["2 entries called `data.pkl`"]),
        (
            "big-endian",
            archive(&[("a/data.pkl", &good), ("a/byteorder", b"big"), ("a/data/0", storage)]),
            vec!["little"],
        ),
        ("outside", archive(&[("../a/data.pkl", &good), ("a/data/0", storage)]), vec!["../a/data/0"]),
    ] {
        assert_refused(&folder.file(&format!("{name}.pth"), &bytes), &said);
        assert_refused(&folder.file(&format!("{name}.bin"), &bytes), &said);
    }

    // An entry that says it unpacks to a thousand times its size.
    let mut bomb = archive(&[("a/data.pkl", &good), ("a/data/0", storage)]);
    let mut patched = 0;
    for at in 0..bomb.len() - 46 {
        // Central directory: method at 10, sizes at 20 (packed) and 24.
        if bomb[at..].starts_with(b"PK\x01\x02") {
            bomb[at + 10] = 8;
            bomb[at + 24..at + 28].copy_from_slice(&u32::MAX.wrapping_sub(16).to_le_bytes());
            patched += 1;
        }
    }
    assert_eq!(patched, 2);
    assert_refused(&folder.file("bomb.pth", &bomb), &["entry `a/data.pkl`", "unpack"]);

    // Many tensors over one storage: together far more than the file.
    let mut pickle = b"\x80\x02}".to_vec();
    let one = tensor_pickle("0", 100_000, 0, &[100_000], &[1]);
    for i in 0..1000 {
        pickle.extend(text(&format!("w{i}")));
        pickle.extend(&one[3 + text("w").len()..one.len() - 1]);
    }
    pickle.push(b'.');
    let zeros = vec![0; 400_000];
    let bytes = archive(&[("a/data.pkl", &pickle), ("a/data/0", &zeros)]);
    assert_refused(&folder.file("views.pth", &bytes), &["the list of tensors", "400000000"]);
}
