//! The lock file: what was trusted first stays, a difference is refused, and pinning anew is an act.

use crate::server::{Reply, Server, sha256};
use crate::{COMMIT, LATER, NAME, PATH, Place, weights};

/// A hub whose main has moved on: old bytes at the old commit, new ones at main and at the new commit.
fn moved_on(old: Vec<u8>, new: Vec<u8>) -> Server {
    Server::start(move |request, _| {
        if request.path.contains(COMMIT) {
            Reply::file(request, &old, COMMIT)
        } else {
            Reply::file(request, &new, LATER)
        }
    })
}

#[test]
fn a_pinned_name_keeps_its_commit_when_main_moves_on() {
    let (place, [old, new]) = (Place::new(), [1, 2].map(|seed| weights(seed, 9000)));
    place.fetch(&Server::good(old.clone(), COMMIT).url(), &[]).expect(0, &[]);
    let lock = place.lock();
    fs_err::remove_dir_all(place.path("hf")).unwrap();
    let hub = moved_on(old.clone(), new.clone());
    let run = place.fetch(&hub.url(), &["--json"]);
    assert_eq!(run.expect(0, &[]).json()["sha256"], sha256(&old));
    assert_eq!(place.lock(), lock);

    // Asked for, main is pinned anew; the old commit stays in the cache.
    let run = place.fetch(&hub.url(), &["--revision", "main", "--json"]);
    let json = run.expect(0, &[]).json();
    assert_eq!((&json["sha256"], &json["commit"]), (&sha256(&new).into(), &LATER.into()));
    assert_eq!(json["newly_pinned"], true);
    assert!(place.lock().contains(LATER) && !place.lock().contains(COMMIT));
    assert_eq!(fs_err::read_to_string(place.repo("refs/main")).unwrap(), LATER);
    assert_eq!(fs_err::read(place.repo("snapshots").join(COMMIT).join("model.safetensors")).unwrap(), old);
    let asked = hub.seen().len();
    place.fetch(&hub.url(), &[]).expect(0, &["in the cache", LATER]);
    // A whole commit in the cache needs no question either.
    place.fetch(&hub.url(), &["--revision", COMMIT]).expect(0, &["in the cache", COMMIT]);
    assert_eq!(hub.seen().len(), asked);
}

#[test]
fn a_difference_from_the_lock_is_refused_before_a_byte_is_downloaded() {
    let [old, new] = [1, 2].map(|seed| weights(seed, 9000));
    let place = Place::new();
    place.fetch(&Server::good(old.clone(), COMMIT).url(), &[]).expect(0, &[]);
    let lock = place.lock();
    fs_err::remove_dir_all(place.path("hf")).unwrap();
    // History rewritten: other bytes at the same commit, or another commit under the old one's name.
    for (bytes, commit, field) in
        [(new.clone(), COMMIT, "sha256 is"), (old.clone(), LATER, "commit is"), (weights(1, 8000), COMMIT, "is")]
    {
        let hub = Server::good(bytes, commit);
        place.fetch(&hub.url(), &[]).expect(4, &[field, "but `weights.lock` says", "--revision main"]);
        assert_eq!(hub.counts(), (1, 0));
        assert_eq!(place.lock(), lock);
    }
    // The hash is right and the bytes are not.
    let served = new.clone();
    let etag = sha256(&old);
    let hub = Server::start(move |request, _| Reply::file(request, &served, COMMIT).with("ETag", &etag));
    place.fetch(&hub.url(), &[]).expect(4, &["sha256 of"]);
    place.expect_usable(&old);
    assert_eq!(place.lock(), lock);
}

#[test]
fn a_lock_that_says_something_else_than_the_cache_is_not_overruled() {
    let (place, bytes) = (Place::new(), weights(1, 9000));
    let hub = Server::good(bytes.clone(), COMMIT);
    place.fetch(&hub.url(), &[]).expect(0, &[]);
    let lock = place.lock();
    fs_err::write(place.path("weights.lock"), lock.replace(&sha256(&bytes), &"5".repeat(64))).unwrap();
    place.fetch(&hub.url(), &[]).expect(4, &["sha256 is", &"5".repeat(64), "weights.lock"]);
    // The table names another file now.
    fs_err::write(place.path("weights.lock"), lock.replace("model.safetensors", "other.safetensors")).unwrap();
    place.fetch(&hub.url(), &[]).expect(4, &["file is model.safetensors", "other.safetensors"]);
    fs_err::write(place.path("weights.lock"), &lock).unwrap();
    place.fetch(&hub.url(), &[]).expect(0, &["in the cache"]);
    assert_eq!(hub.counts(), (1, 1));
}

#[test]
fn a_revision_may_be_a_pull_request_and_is_spelled_as_the_hub_wants() {
    let (place, bytes) = (Place::new(), weights(1, 9000));
    let hub = Server::good(bytes, COMMIT);
    place.fetch(&hub.url(), &["--revision", "refs/pr/3"]).expect(0, &["downloaded"]);
    assert!(hub.seen().iter().all(|r| r.path == PATH.replace("main", "refs%2Fpr%2F3")), "{:?}", hub.seen());
    assert_eq!(fs_err::read_to_string(place.repo("refs/refs/pr/3")).unwrap(), COMMIT);
    assert!(place.lock().contains("revision = \"refs/pr/3\""));
    // Pinned: the commit counts from now on, whatever the revision was.
    place.fetch(&hub.url(), &[]).expect(0, &["in the cache"]);
}

#[test]
fn a_sha256_that_was_given_wins() {
    let (place, [old, new]) = (Place::new(), [1, 2].map(|seed| weights(seed, 9000)));
    let hub = Server::good(old.clone(), COMMIT);
    let wrong = "5".repeat(64);
    place.fetch(&hub.url(), &["--sha256", &wrong]).expect(4, &["sha256 is", &wrong]);
    assert_eq!((hub.counts(), place.lock()), ((1, 0), String::new()));
    place.fetch(&hub.url(), &["--sha256", &sha256(&old).to_uppercase()]).expect(0, &["downloaded"]);
    // Over the lock too: main is asked again for the bytes that are wanted.
    let later = moved_on(old, new.clone());
    place.fetch(&later.url(), &["--sha256", &sha256(&new)]).expect(0, &["downloaded", LATER]);
    assert!(place.lock().contains(&sha256(&new)));
    let two = place.run(place.command(&later.url(), &[NAME, "timm/resnet18", "--sha256", &wrong]));
    two.expect(2, &["--sha256 with 2 names"]);
}

#[test]
fn import_and_inspect_take_a_revision_and_a_sha256() {
    let (place, [old, new]) = (Place::new(), [1, 2].map(|seed| weights(seed, 9000)));
    let hub = moved_on(old.clone(), new.clone());
    let wrong = "5".repeat(64);
    let commands: [&[&str]; 2] =
        [&["weights", "inspect", NAME], &["weights", "import", NAME, "--model", "resnet34", "--out", "imported"]];
    for command in commands {
        let run = |args: &[&str]| place.run(place.program(&hub.url(), &[command, args].concat()));
        let gets = hub.counts().1;
        run(&["--sha256", &wrong]).expect(4, &["sha256 is", &wrong, &sha256(&new)]);
        run(&["--revision", COMMIT, "--sha256", &sha256(&new)]).expect(4, &["sha256 is", &sha256(&old)]);
        assert_eq!((hub.counts().1, place.lock()), (gets, String::new()), "{command:?}");
        run(&["--revision", "../x"]).expect(2, &["revision", "`../x`"]);
        run(&["--sha256", "12"]).expect(2, &["sha256", "64 hexadecimal digits"]);
        // The bytes are no weights: what is fetched and pinned is what counts.
        run(&["--revision", COMMIT]).expect(2, &[]);
        assert!(place.lock().contains(&sha256(&old)), "{}", place.lock());
        run(&["--revision", "main", "--sha256", &sha256(&new).to_uppercase()]).expect(2, &[]);
        assert!(place.lock().contains(&sha256(&new)) && !place.lock().contains(&sha256(&old)), "{}", place.lock());
        fs_err::remove_file(place.path("weights.lock")).unwrap();
    }
    // A file has no revision, and is held to its sha256 as well.
    let asked = hub.seen().len();
    fs_err::write(place.path("model.safetensors"), &old).unwrap();
    let inspect = |args: &[&str]| {
        place.run(place.program(&hub.url(), &[&["weights", "inspect", "model.safetensors"], args].concat()))
    };
    inspect(&["--sha256", &wrong]).expect(4, &["sha256 of", &sha256(&old), &wrong]);
    inspect(&["--revision", "main"]).expect(2, &["revision", "model.safetensors"]);
    assert_eq!(hub.seen().len(), asked);
}

#[test]
fn a_recipe_names_revision_and_sha256_of_its_weights() {
    let [old, new] = [1, 2].map(|seed| weights(seed, 9000));
    let wrong = "5".repeat(64);
    for (role, key, name) in [
        ("student", "encoder_weights", NAME),
        ("student", "weights", NAME),
        ("teacher", "encoder_weights", NAME),
        ("teacher", "weights", NAME),
    ] {
        let place = Place::new();
        let hub = moved_on(old.clone(), new.clone());
        let run = |keys: &[(&str, &str)]| {
            let mut recipe =
                format!("extends = \"toy\"\nname = \"mine\"\n[{role}]\nencoder = \"resnet34\"\n{key} = \"{name}\"\n");
            for (key, value) in keys {
                recipe += &format!("{key} = \"{value}\"\n");
            }
            fs_err::create_dir_all(place.path("recipes")).unwrap();
            fs_err::write(place.path("recipes/mine.toml"), recipe).unwrap();
            place.run(place.program(&hub.url(), &["reproduce", "--recipe", "recipes/mine.toml", "--out", "run"]))
        };
        let lock = || fs_err::read_to_string(place.path("recipes/weights.lock")).unwrap_or_default();
        let about = format!("{role}.{key}");
        run(&[("weights_sha256", "12")]).expect(2, &[&format!("{role}.weights_sha256"), "64 hexadecimal digits"]);
        run(&[("weights_revision", "../x")]).expect(2, &[&format!("{role}.weights_revision"), "`../x`"]);
        assert_eq!(hub.seen().len(), 0, "{about}");
        run(&[("weights_sha256", &wrong)]).expect(4, &["sha256 is", &wrong]);
        assert_eq!((hub.counts(), lock()), ((1, 0), String::new()), "{about}");
        // The bytes are no weights: what is fetched and pinned is what counts.
        run(&[("weights_revision", COMMIT), ("weights_sha256", &sha256(&old))]).expect(2, &[]);
        assert!(lock().contains(&sha256(&old)) && lock().contains(&format!("revision = \"{COMMIT}\"")), "{}", lock());
        let asked = hub.seen().len();
        run(&[("weights_revision", COMMIT)]).expect(2, &[]);
        assert_eq!(hub.seen().len(), asked, "the lock serves a revision it was made from");
        run(&[("weights_revision", "main")]).expect(2, &[]);
        assert!(lock().contains(&sha256(&new)), "{about}: {}", lock());
    }
    // Keys that would mean nothing.
    let place = Place::new();
    let run = |set: &[&str]| {
        let set: Vec<&str> = set.iter().flat_map(|key| ["--set", key]).collect();
        let start = ["reproduce", "--recipe", "toy", "--out", "run"];
        place.run(place.program("http://127.0.0.1:9", &[&start, &set[..]].concat()))
    };
    run(&["student.weights_revision=main"]).expect(2, &["student.weights_revision", "without student.weights"]);
    run(&[&format!("teacher.weights_sha256={wrong}")])
        .expect(2, &["teacher.weights_sha256", "without teacher.weights"]);
    fs_err::write(place.path("model.safetensors"), &old).unwrap();
    let file = "student.encoder_weights=model.safetensors";
    run(&[file, "student.weights_revision=main"]).expect(2, &["revision", "model.safetensors"]);
    run(&[file, &format!("student.weights_sha256={wrong}")]).expect(4, &["sha256 of", &sha256(&old), &wrong]);
}
