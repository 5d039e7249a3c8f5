//! What a hub that behaves is asked, and what is in the cache then.

use std::process::Stdio;
use std::time::Duration;

use crate::server::{Manner, Reply, Server, git_id, sha256};
use crate::{COMMIT, FOLDER, LATER, NAME, PATH, Place, TOKEN, files, weights};

#[test]
fn a_file_is_downloaded_once_and_never_again() {
    let (place, bytes) = (Place::new(), weights(1, 300_000));
    let hub = Server::good(bytes.clone(), COMMIT);
    let first = place.fetch(&hub.url(), &["--json"]);
    let json = first.expect(0, &[]).json();
    assert_eq!(hub.counts(), (1, 1));
    assert!(hub.seen().iter().all(|r| r.path == PATH && r.header("range").is_none()), "{:?}", hub.seen());
    assert!(hub.seen().iter().all(|r| r.header("authorization") == Some(&format!("Bearer {TOKEN}"))));
    let sha = sha256(&bytes);
    for (key, value) in
        [("name", NAME), ("repo", "timm/resnet34.tv_in1k"), ("file", "model.safetensors"), ("revision", "main")]
    {
        assert_eq!(json[key], value);
    }
    for (key, value) in [("commit", COMMIT), ("sha256", &sha), ("from", "hub"), ("layout", "timm")] {
        assert_eq!(json[key], value);
    }
    assert_eq!((&json["size"], &json["newly_pinned"]), (&300_000.into(), &true.into()));

    // The layout of huggingface_hub.
    let snapshot = place.repo("snapshots").join(COMMIT).join("model.safetensors");
    assert_eq!(json["path"], snapshot.to_str().unwrap());
    assert_eq!(fs_err::read_link(&snapshot).unwrap().to_str().unwrap(), format!("../../blobs/{sha}"));
    assert_eq!(fs_err::read(&snapshot).unwrap(), bytes);
    assert_eq!(fs_err::read_to_string(place.repo("refs/main")).unwrap(), COMMIT);
    assert_eq!(files(&place.repo("")), [place.repo("blobs").join(&sha), place.repo("refs/main")]);
    let lock = place.lock();
    for line in [
        format!("commit = \"{COMMIT}\""),
        format!("sha256 = \"{sha}\""),
        "size = 300000".into(),
        "revision = \"main\"".into(),
    ] {
        assert!(lock.lines().any(|l| l == line), "{lock}");
    }

    // Pinned and here: nobody is asked.
    for _ in 0..2 {
        let again = place.fetch(&hub.url(), &["--json"]);
        let json = again.expect(0, &[]).json();
        assert_eq!((&json["from"], &json["newly_pinned"]), (&"cache".into(), &false.into()));
    }
    assert_eq!(hub.counts(), (1, 1));
    assert_eq!(place.lock(), lock);

    // Without the lock the hub is asked what main is now, but not for the bytes.
    fs_err::remove_file(place.path("weights.lock")).unwrap();
    assert_eq!(place.fetch(&hub.url(), &["--json"]).expect(0, &[]).json()["from"], "cache");
    assert_eq!(hub.counts(), (2, 1));
    assert_eq!(place.lock(), lock);

    // Gone from the cache: the pinned commit is asked for, not main.
    fs_err::remove_dir_all(place.path("hf")).unwrap();
    place.fetch(&hub.url(), &[]).expect(0, &["downloaded", "as `weights.lock` says"]);
    assert_eq!(hub.counts(), (3, 2));
    assert!(hub.seen()[3..].iter().all(|r| r.path == PATH.replace("main", COMMIT)), "{:?}", hub.seen());
}

#[test]
fn a_redirect_to_another_host_is_followed_without_the_token() {
    let (place, bytes) = (Place::new(), weights(2, 100_000));
    let served = bytes.clone();
    // Another port is another host.
    let store = Server::start(move |request, _| {
        Reply::file(request, &served, COMMIT).without("X-Repo-Commit").with("ETag", "\"other\"")
    });
    let (location, served) = (format!("{}/store/x?X-Amz-Signature=geheim", store.url()), bytes.clone());
    let hub = Server::start(move |_, _| Reply::elsewhere(&served, COMMIT, &location));
    let run = place.fetch(&hub.url(), &[]);
    run.expect(0, &["downloaded"]);
    assert!(!run.stderr.contains("geheim"), "{}", run.stderr);
    assert_eq!((hub.counts(), store.counts()), ((1, 0), (0, 1)), "the bytes are asked for where the hub points");
    assert!(hub.seen()[0].header("authorization").is_some());
    let seen = store.seen();
    assert_eq!((seen[0].path.as_str(), seen[0].header("authorization")), ("/store/x?X-Amz-Signature=geheim", None));
    assert!(!format!("{seen:?}").contains(TOKEN));
    place.expect_usable(&bytes);
}

#[test]
fn a_redirect_on_the_same_host_keeps_the_token() {
    let (place, bytes) = (Place::new(), weights(3, 50_000));
    let served = bytes.clone();
    let hub = Server::start(move |request, _| match request.path.as_str() {
        PATH => Reply::status(307).with("Location", "/moved/model.safetensors").with("X-Repo-Commit", COMMIT),
        _ => Reply::file(request, &served, COMMIT),
    });
    place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
    assert_eq!(hub.counts(), (2, 1));
    assert!(hub.seen().iter().all(|r| r.header("authorization").is_some()));
}

#[test]
fn the_hub_itself_says_what_a_file_is_and_no_other_host() {
    let bytes = weights(9, 60_000);
    // A mirror that has no X-Linked-Etag: its own ETag stands beside the redirect, and the store knows another one.
    for store_knows in [true, false] {
        let place = Place::new();
        let served = bytes.clone();
        let store = Server::start(move |request, _| match (request.method.as_str(), store_knows) {
            ("HEAD", false) => Reply::status(403),
            _ => Reply::file(request, &served, LATER).with("ETag", "\"0123456789abcdef0123456789abcdef\""),
        });
        let (location, served) = (format!("{}/store/x", store.url()), bytes.clone());
        let hub = Server::start(move |_, _| {
            Reply::elsewhere(&served, COMMIT, &location)
                .without("X-Linked-Etag")
                .without("X-Linked-Size")
                .with("ETag", &format!("\"{}\"", sha256(&served)))
        });
        place.fetch(&hub.url(), &[]).expect(0, &["downloaded", COMMIT]);
        assert_eq!((hub.counts(), store.counts()), ((1, 0), (0, 1)));
        place.expect_usable(&bytes);
    }
    // What the hub does not say is not asked of another host, however much that one would tell.
    for missing in ["X-Repo-Commit", "X-Linked-Etag"] {
        let place = Place::new();
        let served = bytes.clone();
        let store = Server::start(move |request, _| {
            let sha256 = format!("\"{}\"", sha256(&served));
            Reply::file(request, &served, COMMIT).with("X-Linked-Etag", &sha256)
        });
        let (location, served) = (format!("{}/store/x", store.url()), bytes.clone());
        let hub = Server::start(move |_, _| Reply::elsewhere(&served, COMMIT, &location).without(missing));
        let said = missing.trim_start_matches("X-Linked-").replace("Etag", "ETag");
        place.fetch(&hub.url(), &[]).expect(4, &[&format!("no {said}")]);
        assert_eq!((hub.counts(), store.counts()), ((1, 0), (0, 0)), "{missing}");
        place.expect_usable(&bytes);
    }
    // A renamed repository: what stands beside the way there is not what the file is.
    let place = Place::new();
    let served = bytes.clone();
    let hub = Server::start(move |request, _| match request.path.as_str() {
        PATH => Reply::status(307).with("Location", "/moved/x").with("ETag", "W/\"3b-the page of the redirect\""),
        _ => Reply::file(request, &served, COMMIT),
    });
    place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
    place.expect_usable(&bytes);
}

#[test]
fn a_hub_may_say_no_length_and_write_hashes_in_capitals() {
    let bytes = weights(10, 60_000);
    let capitals = |reply: Reply, bytes: &[u8]| reply.with("ETag", &format!("\"{}\"", sha256(bytes).to_uppercase()));
    for odd in [0, 1, 2] {
        let place = Place::new();
        let served = bytes.clone();
        let hub = Server::start(move |request, _| {
            let reply = Reply::file(request, &served, COMMIT);
            match (odd, request.method.as_str()) {
                (0, "HEAD") => reply.with("Content-Length", "0"),
                // Without any length.
                (1, "HEAD") => reply.with("Transfer-Encoding", "chunked"),
                (2, _) => capitals(reply, &served),
                _ => reply,
            }
        });
        place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
        place.expect_usable(&bytes);
    }
}

#[test]
fn a_cache_that_is_only_read_serves_what_it_holds() {
    let (place, bytes) = (Place::new(), weights(11, 9000));
    let hub = Server::good(bytes.clone(), COMMIT);
    place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
    // Nothing can be made in a file, whoever the tests run as.
    for (folder, kept) in [("hf/hub/.locks", "locks"), (&format!("hf/hub/{FOLDER}/refs"), "refs")] {
        fs_err::rename(place.path(folder), place.path(kept)).unwrap();
        fs_err::write(place.path(folder), "").unwrap();
    }
    for revision in ["main", COMMIT, "other"] {
        fs_err::remove_file(place.path("weights.lock")).unwrap();
        let run = place.fetch(&hub.url(), &["--revision", revision]);
        run.expect(0, &["in the cache", &sha256(&bytes), COMMIT]);
        assert_eq!(hub.counts().1, 1, "{revision} was downloaded again");
        // What a branch stands for now cannot be written down: no reason to stop, and said.
        assert_eq!(run.stderr.contains("refs"), revision != COMMIT, "{revision}: {}", run.stderr);
    }
}

#[test]
fn no_token_is_sent_when_none_is_meant() {
    let place = Place::new();
    let hub = Server::good(weights(1, 1000), COMMIT);
    let mut command = place.command(&hub.url(), &[NAME]);
    command.env("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1");
    place.run(command).expect(0, &[]);
    assert!(hub.seen().iter().all(|r| r.header("authorization").is_none()));
}

#[test]
fn an_endpoint_may_have_a_path_and_small_files_a_git_id() {
    let (place, bytes) = (Place::new(), weights(4, 4000));
    let served = bytes.clone();
    let hub = Server::start(move |request, _| {
        Reply::file(request, &served, COMMIT).with("ETag", &format!("W/\"{}\"", git_id(&served)))
    });
    place.fetch(&format!("{}/mirror/", hub.url()), &[]).expect(0, &[&sha256(&bytes)]);
    assert!(hub.seen().iter().all(|r| r.path == format!("/mirror{PATH}")));
    assert_eq!(files(&place.repo("blobs")), [place.repo("blobs").join(git_id(&bytes))]);
    place.fetch(&hub.url(), &[]).expect(0, &["in the cache"]);
    assert_eq!(hub.seen().len(), 2);
}

#[test]
fn a_broken_download_is_continued_where_it_broke() {
    let (place, bytes) = (Place::new(), weights(5, 400_000));
    let served = bytes.clone();
    let hub = Server::start(move |request, n| {
        let reply = Reply::file(request, &served, COMMIT);
        if n == 1 { reply.sent(Manner::CutAfter(250_000)) } else { reply }
    });
    // In one run.
    place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
    let ranges: Vec<_> =
        hub.seen().iter().filter(|r| r.method == "GET").map(|r| r.header("range").map(str::to_string)).collect();
    assert_eq!(ranges, [None, Some("bytes=250000-".to_string())]);
    place.expect_usable(&bytes);

    // In two runs, with a stall instead of an end, against a store on another host.
    let place = Place::new();
    let served = bytes.clone();
    let store = Server::start(move |request, n| {
        let reply = Reply::file(request, &served, COMMIT);
        if n == 0 { reply.sent(Manner::StallAfter(100_000)) } else { reply }
    });
    let (location, served) = (store.url(), bytes.clone());
    let hub = Server::start(move |_, _| Reply::elsewhere(&served, COMMIT, &location));
    place.fetch(&hub.url(), &["--retries", "0"]).expect(4, &["nothing came for 600ms"]);
    // What came is kept when the hub refuses in between.
    let refusing = {
        let served = bytes.clone();
        Server::start(move |request, _| match request.method.as_str() {
            "HEAD" => Reply::file(request, &served, COMMIT),
            _ => Reply::status(404),
        })
    };
    place.fetch(&refusing.url(), &[]).expect(4, &["answered 404"]);
    place.fetch(&hub.url(), &[]).expect(0, &["downloaded", "continues at 97 KiB"]);
    assert_eq!(store.seen()[1].header("range"), Some("bytes=100000-"));
    place.expect_usable(&bytes);
}

#[test]
fn two_processes_download_a_file_once_and_lose_no_pin() {
    let (place, bytes) = (Place::new(), weights(6, 200_000));
    let served = bytes.clone();
    let hub = Server::start(move |request, _| {
        if request.method == "GET" {
            std::thread::sleep(Duration::from_millis(300));
        }
        Reply::file(request, &served, COMMIT)
    });
    let other = "timm/resnet18";
    let start = |name: &str| {
        place.command(&hub.url(), &[name, "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let running = [start(NAME), start(NAME), start(other)];
    for child in running {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let gets = |part: &str| hub.seen().iter().filter(|r| r.method == "GET" && r.path.contains(part)).count();
    assert_eq!((gets("resnet34"), gets("resnet18")), (1, 1));
    let lock = place.lock();
    assert!(lock.contains(&format!("\"{NAME}\"")) && lock.contains(&format!("\"{other}\"")), "{lock}");
    place.expect_usable(&bytes);
}

#[test]
fn a_download_that_was_killed_is_continued() {
    let (place, bytes) = (Place::new(), weights(7, 500_000));
    let served = bytes.clone();
    let hub = Server::start(move |request, n| {
        let reply = Reply::file(request, &served, COMMIT);
        if n == 1 { reply.sent(Manner::StallAfter(200_000)) } else { reply }
    });
    let mut command = place.command(&hub.url(), &[NAME, "--timeout", "30"]);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let partial = place.repo("blobs").join(format!("{}.incomplete", sha256(&bytes)));
    let came = || fs_err::metadata(&partial).is_ok_and(|meta| meta.len() == 200_000);
    for _ in 0..500 {
        if came() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(came());
    child.kill().unwrap();
    child.wait().unwrap();
    place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
    assert_eq!(hub.seen().last().unwrap().header("range"), Some("bytes=200000-"));
    place.expect_usable(&bytes);
}

#[test]
fn several_names_are_fetched_in_one_run() {
    let place = Place::new();
    let hub = Server::good(weights(8, 1000), COMMIT);
    let run = place.run(place.command(&hub.url(), &[NAME, "timm/resnet18", "--json", "--lock", "recipes/my.lock"]));
    run.expect(0, &["timm/resnet18.tv_in1k", "timm/resnet34.tv_in1k"]);
    assert!(place.path("recipes/my.lock").is_file() && !place.path("weights.lock").exists());
    // The first stays fetched and pinned when the second fails.
    let place = Place::new();
    let run = place.run(place.command(&hub.url(), &[NAME, "timm/resnet1"]));
    run.expect(2, &["timm/resnet34: downloaded", "`timm/resnet1`"]);
    assert!(place.lock().contains(NAME));
}
