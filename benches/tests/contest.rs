//! The contest against sides that are shell scripts: what it asks, what it accepts, and how it ends when a side
//! misbehaves. Nothing here depends on time but the patience with a side that hangs.
#![cfg(unix)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use segdistill_benches::BenchError;
use segdistill_benches::case::{Case, Layout, Precision};
use segdistill_benches::catalogue::cases;
use segdistill_benches::contest::{Contest, Settings};

/// A program that greets and then answers each line by `answer`, a shell fragment over `$line`.
fn script(folder: &Path, name: &str, answer: &str) -> PathBuf {
    let greeting = r#"{"hello":"segdistill-bench 1","about":"a script","threads":3,"idle_kib":1024}"#;
    let text = format!(
        "#!/bin/sh\necho '{greeting}'\nwhile read -r line; do\n  echo \"$line\" >> '{}'\n{answer}\ndone\n",
        folder.join(format!("{name}.log")).display()
    );
    write(folder, name, &text)
}

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let path = folder.join(name);
    fs_err::write(&path, text).unwrap();
    fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Answers `value` to `prepare`, and rounds of `ms`.
fn good(value: f64, ms: f64) -> String {
    format!(
        "case \"$line\" in\n\
         *'\"do\":\"prepare\"'*) echo '{{\"answer\":{{\"y\":{value}}}}}' ;;\n\
         *'\"do\":\"round\"'*) echo '{{\"ms\":{ms},\"runs\":4,\"peak_kib\":5120}}' ;;\n\
         *) echo '{{\"gflops\":100.0,\"vector_bits\":256}}' ;;\nesac"
    )
}

fn case(name: &str) -> Case {
    cases().unwrap().into_iter().find(|case| case.name == name).unwrap()
}

fn settings(ours: PathBuf, peer: Option<PathBuf>) -> Settings {
    Settings {
        worker: (ours, Vec::new()),
        peer,
        layouts: Layout::ALL.to_vec(),
        precision: Precision::F32,
        threads: 3,
        rounds: 4,
        least_ms: 7.0,
        patience: Duration::from_secs(20),
    }
}

const CASE: &str = "resnet34/encoder.layer1.0.conv1";

fn run(settings: Settings) -> Result<segdistill_benches::results::CaseResult, BenchError> {
    Contest::new(settings)?.run(&case(CASE), &mut |_| ())
}

#[test]
fn both_sides_are_asked_in_turn_and_their_figures_kept() {
    let folder = tempfile::tempdir().unwrap();
    let ours = script(folder.path(), "ours", &good(0.5, 10.0));
    let peer = script(folder.path(), "peer", &good(0.5002, 20.0));
    let mut contest = Contest::new(settings(ours, Some(peer))).unwrap();
    assert_eq!(contest.about_peer(), Some("a script"));
    let mut stages = Vec::new();
    let result = contest.run(&case(CASE), &mut |stage| stages.push(stage.to_string())).unwrap();
    assert_eq!(result.ours.as_ref().unwrap().ms, [10.0; 4]);
    assert_eq!(result.peers.keys().copied().collect::<Vec<_>>(), Layout::ALL);
    assert_eq!((result.ratio(Precision::F32), result.ratio(Precision::Bf16)), (Some(0.5), Some(0.5)));
    assert_eq!(result.ours.as_ref().unwrap().grown_mib(), 4.0);
    assert!(stages.contains(&"round 4 of 4".to_string()), "{stages:?}");

    // Ours is checked in one process and timed in another; the peer's three processes share one log.
    let log = |name: &str| fs_err::read_to_string(folder.path().join(format!("{name}.log"))).unwrap();
    let count = |text: &str, word: &str| text.lines().filter(|l| l.contains(word)).count();
    let (ours, peer) = (log("ours"), log("peer"));
    assert_eq!([count(&ours, "\"answer\":true"), count(&ours, "\"answer\":false"), count(&ours, "round")], [1, 1, 4]);
    assert_eq!([count(&peer, "\"answer\":true"), count(&peer, "round")], [3, 12]);
    for layout in Layout::ALL {
        assert_eq!(count(&peer, &format!("\"variant\":\"{}\"", layout.name())), 1);
    }
    assert!(peer.contains("\"op\":\"conv\"") && peer.contains("\"weight\":[64,64,3,3]"), "{peer}");
    assert_eq!(count(&peer, "\"least_ms\":7.0"), 12);
}

#[test]
fn an_answer_that_differs_is_not_timed() {
    let folder = tempfile::tempdir().unwrap();
    let ours = script(folder.path(), "ours", &good(0.5, 10.0));
    let peer = script(folder.path(), "peer", &good(0.51, 20.0));
    let error = run(settings(ours, Some(peer))).unwrap_err();
    assert!(matches!(error, BenchError::Wrong { .. }));
    let text = error.to_string();
    assert!([CASE, "`y`", "5.0", "5.1", "nchw"].iter().all(|word| text.contains(word)), "{text}");
    assert!(!fs_err::read_to_string(folder.path().join("peer.log")).unwrap().contains("round"));
}

#[test]
fn without_a_peer_only_ours_runs() {
    let folder = tempfile::tempdir().unwrap();
    let ours = script(folder.path(), "ours", &good(0.5, 10.0));
    let result = run(settings(ours, None)).unwrap();
    assert!(result.peers.is_empty() && result.ours.is_some() && result.ratio(Precision::F32).is_none());
}

#[test]
fn a_side_that_dies_is_named_with_its_last_words() {
    let folder = tempfile::tempdir().unwrap();
    let ours = script(folder.path(), "ours", &good(0.5, 10.0));
    let peer = script(folder.path(), "peer", "echo 'out of paper' >&2; exit 7");
    let text = run(settings(ours, Some(peer))).unwrap_err().to_string();
    assert!(["peer (nchw)", "exit status: 7", "out of paper", CASE].iter().all(|w| text.contains(w)), "{text}");
}

#[test]
fn a_side_that_hangs_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let ours = script(folder.path(), "ours", &good(0.5, 10.0));
    let peer = script(folder.path(), "peer", "exec sleep 600");
    let begun = Instant::now();
    let settings = Settings { patience: Duration::from_secs(2), ..settings(ours, Some(peer)) };
    let text = run(settings).unwrap_err().to_string();
    assert!(["peer (nchw)", "no answer", "within 2 s", "--timeout"].iter().all(|w| text.contains(w)), "{text}");
    assert!(begun.elapsed() < Duration::from_secs(60), "waited {:?}", begun.elapsed());
}

#[test]
fn a_side_that_talks_nonsense_is_quoted() {
    let folder = tempfile::tempdir().unwrap();
    let ours = script(folder.path(), "ours", &good(0.5, 10.0));
    let peer = script(folder.path(), "peer", "echo 'loading weights'");
    let text = run(settings(ours.clone(), Some(peer))).unwrap_err().to_string();
    assert!(text.contains("`loading weights`"), "{text}");
    let refuses = script(folder.path(), "refuses", "echo '{\"error\":\"no such layout\"}'");
    let text = run(settings(ours.clone(), Some(refuses))).unwrap_err().to_string();
    assert!(text.contains("no such layout") && text.contains("prepare"), "{text}");
    // A NaN is no JSON number, a time of 0 no time.
    let zero = script(folder.path(), "zero", &good(0.5, 0.0));
    let text = run(settings(ours, Some(zero))).unwrap_err().to_string();
    assert!(text.contains("answered `round`"), "{text}");
}

#[test]
fn a_peer_that_cannot_start_is_a_usage_error() {
    let folder = tempfile::tempdir().unwrap();
    let ours = script(folder.path(), "ours", &good(0.5, 10.0));
    let usage = |peer: PathBuf, words: &[&str]| {
        let Err(error) = Contest::new(settings(ours.clone(), Some(peer))) else { panic!("it started") };
        assert!(matches!(error, BenchError::Usage { .. }), "{error}");
        let text = error.to_string();
        assert!(words.iter().all(|w| text.contains(w)), "{text}");
    };
    usage(folder.path().join("no/such/python"), &["no/such/python", "a Python with torch", "--peer"]);
    usage("no-such-python-anywhere".into(), &["no-such-python-anywhere", "--peer"]);
    let said = r#"{"error":"it has no torch","hint":"install torch","usage":true}"#;
    usage(write(folder.path(), "bare", &format!("#!/bin/sh\necho '{said}'\n")), &["no torch", "install torch"]);

    let other = write(
        folder.path(),
        "other",
        "#!/bin/sh\necho '{\"hello\":\"something else\",\"about\":\"\",\"threads\":3,\"idle_kib\":0}'\nread -r line\n",
    );
    let Err(error) = Contest::new(settings(ours.clone(), Some(other))) else { panic!("it started") };
    assert!(error.to_string().contains("segdistill-bench 1"), "{error}");
    let Err(error) = Contest::new(Settings { threads: 2, ..settings(ours.clone(), Some(ours.clone())) }) else {
        panic!("it started")
    };
    assert!(error.to_string().contains("3 threads, expected 2"), "{error}");
}

#[test]
fn what_does_not_fit_is_left_out_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let ours = script(folder.path(), "ours", &good(0.5, 10.0));
    let mut contest = Contest::new(settings(ours, None)).unwrap();
    let huge = Case { needs_mib: 1 << 40, ..case(CASE) };
    let result = contest.run(&huge, &mut |_| ()).unwrap();
    assert!(result.ours.is_none() && result.left_out.unwrap().contains("MiB"));
}
