//! Answers that a hub does not give, and bytes that are not the promised ones.

use crate::server::{Manner, Reply, Server, git_id, sha256};
use crate::{COMMIT, LATER, NAME, PATH, Place, files, weights};

/// Fetches from a hub that `spoils` its good answers; the error says `words`, nothing is pinned, nothing is outside the
/// cache, and the cache stays usable.
#[track_caller]
fn expect_refused(spoil: impl Fn(Reply, &str) -> Reply + Send + Sync + 'static, words: &[&str]) {
    let (place, bytes) = (Place::new(), weights(1, 300_000));
    let served = bytes.clone();
    let hub = Server::start(move |request, _| spoil(Reply::file(request, &served, COMMIT), &request.method));
    place.fetch(&hub.url(), &[]).expect(4, words);
    assert_eq!(place.lock(), "", "nothing is pinned");
    let outside: Vec<_> = files(&place.path("")).into_iter().filter(|f| !f.starts_with(place.path("hf/hub"))).collect();
    assert!(outside.is_empty(), "{outside:?}");
    assert!(!place.repo("snapshots").exists() && !place.repo("refs").exists());
    place.expect_usable(&bytes);
}

#[test]
fn names_that_leave_the_cache_are_refused() {
    for etag in
        ["\"../../../../../escaped\"", "\"/tmp/escaped\"", "\"..\"", "\"\"", "\"abc\"", "\"con\\\\nul\"", "W/\"x/y\""]
    {
        expect_refused(move |reply, _| reply.with("ETag", etag), &["ETag", "hexadecimal digits"]);
        expect_refused(move |reply, _| reply.with("X-Linked-Etag", etag), &["ETag", "hexadecimal digits"]);
    }
    for commit in ["../../../escaped", "main", "", "0123", &LATER[..39]] {
        let commit = commit.to_string();
        expect_refused(
            move |reply, _| reply.with("X-Repo-Commit", &commit),
            &["X-Repo-Commit", "40 hexadecimal digits"],
        );
    }
}

#[test]
fn answers_without_what_a_hub_says_are_refused() {
    expect_refused(|reply, _| reply.without("ETag"), &["no ETag"]);
    expect_refused(|reply, _| reply.without("X-Repo-Commit"), &["no X-Repo-Commit"]);
    expect_refused(|reply, _| reply.with("X-Linked-Size", "many"), &["length `many`"]);
    expect_refused(|reply, _| reply.with("X-Linked-Size", "99999999999999"), &["at most 16 GiB"]);
    expect_refused(|reply, _| Reply { status: 0, ..reply }.carrying(b"SSH-2.0-OpenSSH\r\n\r\n".to_vec()), &["hint: "]);
    expect_refused(
        |reply, _| reply.with("X-Padding", &"x".repeat(200_000)),
        &["expected an answer as HTTP/1.1 has it"],
    );
    expect_refused(|_, _| Reply::status(302), &["a redirect to ``"]);
    expect_refused(
        |_, _| Reply::status(302).with("Location", "file:///etc/passwd"),
        &["a redirect to `file:///etc/passwd`"],
    );
    expect_refused(|_, _| Reply::status(302).with("Location", PATH), &["more than 6 redirects"]);
    expect_refused(
        |reply, method| if method == "GET" { Reply::status(302).with("Location", PATH) } else { reply },
        &["more than 6 redirects"],
    );
    // Documentation addresses: nobody is there, and nobody is asked.
    expect_refused(
        |_, _| Reply::status(302).with("Location", "http://192.0.2.1/x"),
        &["sends on to http://192.0.2.1/x, expected an https"],
    );
}

#[test]
fn damaged_bytes_are_refused() {
    let flip = |mut reply: Reply, method: &str| {
        if method == "GET" {
            reply.body[200_000] ^= 1;
        }
        reply
    };
    expect_refused(flip, &["sha256 of", ".incomplete", "nothing of it was kept"]);
    // Honest about being short, short without a word, and longer than the file.
    let half = |reply: Reply, method: &str| {
        let size = reply.body.len();
        let reply = reply.with("X-Linked-Size", &size.to_string());
        if method == "GET" { reply.carrying(weights(1, size / 2)) } else { reply }
    };
    expect_refused(half, &["size of", "150000, expected 300000"]);
    expect_refused(|reply, _| reply.with("Content-Length", "300000").carrying(Vec::new()), &["hint: "]);
    let more = |reply: Reply, method: &str| {
        let longer = [&reply.body[..], b"more"].concat();
        if method == "GET" { reply.carrying(longer) } else { reply.with("Content-Length", "300000") }
    };
    expect_refused(more, &["size of", "300004, expected 300000"]);
    let endless = |reply: Reply, method: &str| {
        let longer = format!("{:x}\r\n{}\r\n0\r\n\r\n", 700_000, "x".repeat(700_000)).into_bytes();
        if method == "GET" { reply.carrying(longer).with("Transfer-Encoding", "chunked") } else { reply }
    };
    expect_refused(endless, &["size of", "more than 300000"]);
    let packed =
        |reply: Reply, method: &str| if method == "GET" { reply.with("Content-Encoding", "gzip") } else { reply };
    expect_refused(packed, &["gzip", "expected an answer as HTTP/1.1 has it"]);
}

#[test]
fn a_body_that_always_ends_early_is_left_after_a_few_tries() {
    let (place, bytes) = (Place::new(), weights(2, 300_000));
    let served = bytes.clone();
    // Knows no ranges: begins anew each time, and never comes to the end.
    let hub = Server::start(move |request, _| {
        let reply = Reply::file(request, &served, COMMIT);
        let whole = Reply { status: 200, ..reply }
            .without("Content-Range")
            .with("Content-Length", "300000")
            .carrying(served.clone());
        whole.sent(Manner::CutAfter(200_000))
    });
    place.fetch(&hub.url(), &["--retries", "2"]).expect(4, &["hint: "]);
    assert_eq!(hub.counts(), (1, 3));
    place.expect_usable(&bytes);
}

#[test]
fn a_length_beyond_every_file_is_refused_wherever_it_is_said() {
    let long = |reply: Reply, method: &str| match method {
        "HEAD" => reply.with("Transfer-Encoding", "chunked"),
        _ => reply.with("Content-Length", "99999999999999"),
    };
    expect_refused(long, &["length `99999999999999`", "at most 16 GiB"]);
}

#[test]
fn a_hub_that_knows_no_ranges_and_cuts_here_and_there_is_left() {
    let (place, bytes) = (Place::new(), weights(8, 3 << 20));
    let served = bytes.clone();
    let hub = Server::start(move |request, n| {
        let reply = Reply::file(request, &served, COMMIT);
        let whole = Reply { status: 200, ..reply }.without("Content-Range").carrying(served.clone());
        let whole = whole.with("Content-Length", &served.len().to_string());
        // Longer and shorter by turns: each second body is a megabyte more than the one before.
        if n > 20 { whole } else { whole.sent(Manner::CutAfter(if n % 2 == 0 { 5 << 19 } else { 1 << 20 })) }
    });
    place.fetch(&hub.url(), &["--retries", "2", "--timeout", "0.3"]).expect(4, &["hint: "]);
    assert!(hub.counts().1 <= 6, "{:?}", hub.counts());
    place.expect_usable(&bytes);
}

#[test]
fn a_range_that_was_not_asked_for_begins_the_file_anew() {
    let bytes = weights(9, 300_000);
    for range in ["bytes 0-299999/300000", "bytes 150001-299999/300000", "bytes 150000-299998/300000", "items", ""] {
        let place = Place::new();
        let served = bytes.clone();
        let hub = Server::start(move |request, n| {
            let reply = Reply::file(request, &served, COMMIT);
            match (n, reply.status) {
                (1, _) => reply.sent(Manner::CutAfter(150_000)),
                (_, 206) => reply.with("Content-Range", range),
                _ => reply,
            }
        });
        place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
        assert_eq!(hub.counts(), (1, 3), "{range}");
        assert_eq!(hub.seen().last().unwrap().header("range"), None);
        place.expect_usable(&bytes);
    }
    // Parts only, whatever is asked for: left at once.
    let place = Place::new();
    let hub = Server::start(move |request, _| {
        let reply = Reply::file(request, &weights(9, 300_000), COMMIT);
        if request.method == "HEAD" {
            reply
        } else {
            Reply { status: 206, ..reply }.with("Content-Range", "bytes 7-9/10")
        }
    });
    let partial = place.repo("blobs").join(format!("{}.incomplete", sha256(&bytes)));
    fs_err::create_dir_all(partial.parent().unwrap()).unwrap();
    fs_err::write(&partial, &bytes[..1000]).unwrap();
    place.fetch(&hub.url(), &[]).expect(4, &["status 206, expected 200"]);
    assert_eq!(hub.counts(), (1, 2));
    place.expect_usable(&bytes);
}

#[test]
fn a_small_file_is_held_to_its_git_id() {
    let small = |bytes: &[u8]| {
        let served = bytes.to_vec();
        Server::start(move |request, _| {
            Reply::file(request, &served, COMMIT).with("ETag", &format!("\"{}\"", git_id(&served)))
        })
    };
    // On its way: the size is right and the bytes are not.
    let (place, bytes) = (Place::new(), weights(10, 5000));
    let served = bytes.clone();
    let hub = Server::start(move |request, _| {
        let mut reply = Reply::file(request, &served, COMMIT).with("ETag", &git_id(&served));
        reply.body[4000] ^= 1;
        reply
    });
    place.fetch(&hub.url(), &[]).expect(4, &["git id of", &git_id(&bytes), "nothing of it was kept"]);
    assert_eq!(place.lock(), "");
    place.expect_usable(&bytes);

    // On disk: neither used nor pinned, with and without a network.
    let place = Place::new();
    let hub = small(&bytes);
    place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
    let lock = place.lock();
    let blob = place.repo("blobs").join(git_id(&bytes));
    fs_err::write(&blob, [&bytes[..4999], b"x"].concat()).unwrap();
    fs_err::remove_file(place.path("weights.lock")).unwrap();
    let mut command = place.command(&hub.url(), &[NAME]);
    command.env("HF_HUB_OFFLINE", "1");
    place.run(command).expect(4, &["git id of", "damaged on disk"]);
    assert_eq!(place.lock(), "");
    place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
    assert_eq!((fs_err::read(&blob).unwrap(), place.lock()), (bytes.clone(), lock));

    // A download that broke is continued: the id tells afterwards whether the halves belong together.
    let place = Place::new();
    let partial = place.repo("blobs").join(format!("{}.incomplete", git_id(&bytes)));
    fs_err::create_dir_all(partial.parent().unwrap()).unwrap();
    for (kept, gets) in [(&bytes[..1000], 1), (&weights(3, 1000)[..], 2)] {
        fs_err::write(&partial, kept).unwrap();
        let hub = small(&bytes);
        place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
        assert_eq!(hub.counts(), (1, gets));
        fs_err::remove_file(place.repo("blobs").join(git_id(&bytes))).unwrap();
        fs_err::remove_file(place.path("weights.lock")).unwrap();
    }
}

#[test]
fn what_was_kept_of_another_file_is_not_used() {
    let bytes = weights(3, 300_000);
    for kept in [weights(9, 100_000), weights(9, 300_000), weights(9, 400_000), Vec::new()] {
        let place = Place::new();
        let partial = place.repo("blobs").join(format!("{}.incomplete", sha256(&bytes)));
        fs_err::create_dir_all(partial.parent().unwrap()).unwrap();
        fs_err::write(&partial, &kept).unwrap();
        let hub = Server::good(bytes.clone(), COMMIT);
        place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
        let expected = if kept.len() == 100_000 { (1, 2) } else { (1, 1) };
        assert_eq!(hub.counts(), expected, "{} bytes kept", kept.len());
        place.expect_usable(&bytes);
    }
    // Whole but never named: nothing is downloaded.
    let place = Place::new();
    let partial = place.repo("blobs").join(format!("{}.incomplete", sha256(&bytes)));
    fs_err::create_dir_all(partial.parent().unwrap()).unwrap();
    fs_err::write(&partial, &bytes).unwrap();
    let hub = Server::good(bytes.clone(), COMMIT);
    place.fetch(&hub.url(), &[]).expect(0, &[]);
    assert_eq!(hub.counts(), (1, 0));
    place.expect_usable(&bytes);
}

#[cfg(unix)]
#[test]
fn a_link_in_the_place_of_a_partial_file_is_not_written_through() {
    let (place, bytes) = (Place::new(), weights(4, 9000));
    let partial = place.repo("blobs").join(format!("{}.incomplete", sha256(&bytes)));
    fs_err::create_dir_all(partial.parent().unwrap()).unwrap();
    fs_err::write(place.path("precious"), "keep me").unwrap();
    fs_err::os::unix::fs::symlink(place.path("precious"), &partial).unwrap();
    let hub = Server::good(bytes.clone(), COMMIT);
    place.fetch(&hub.url(), &[]).expect(0, &[]);
    assert_eq!(fs_err::read_to_string(place.path("precious")).unwrap(), "keep me");
    place.expect_usable(&bytes);
}

#[test]
fn other_formats_are_refused_by_their_first_bytes() {
    for (bytes, words) in [
        (b"PK\x03\x04 what torch.save writes, renamed".to_vec(), ["zip archive", "weights import"]),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.".to_vec(), ["Python pickle", "weights import"]),
        (b"<!doctype html><title>Sign in</title>".to_vec(), ["web page", "safetensors"]),
        (b"version https://git-lfs.github.com/spec/v1\n".to_vec(), ["Git LFS pointer", "safetensors"]),
        (vec![0xff; 64], ["no known format", "safetensors"]),
    ] {
        let place = Place::new();
        // Its hash and size are as the hub says.
        let hub = Server::good(bytes, COMMIT);
        place.fetch(&hub.url(), &[]).expect(4, &words);
        assert_eq!(place.lock(), "");
        place.expect_usable(&weights(5, 4000));
    }
    // And the other way round: the table says torch.save.
    let place = Place::new();
    let hub = Server::good(weights(5, 4000), COMMIT);
    let name = "nvidia/segformer-b0-finetuned-cityscapes-1024-1024";
    place
        .run(place.command(&hub.url(), &[name]))
        .expect(4, &["a safetensors file, expected a file that torch.save wrote"]);
}

#[test]
fn a_file_that_was_damaged_on_disk_is_not_used() {
    let (place, bytes) = (Place::new(), weights(6, 9000));
    let hub = Server::good(bytes.clone(), COMMIT);
    place.fetch(&hub.url(), &[]).expect(0, &[]);
    let blob = place.repo("blobs").join(sha256(&bytes));
    for damaged in [bytes[..8000].to_vec(), [&bytes[..8999], b"x"].concat(), Vec::new()] {
        fs_err::write(&blob, &damaged).unwrap();
        let mut command = place.command(&hub.url(), &[NAME]);
        command.env("HF_HUB_OFFLINE", "1");
        place.run(command).expect(4, &["sha256 of", "damaged on disk"]);
        place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
        assert_eq!(fs_err::read(&blob).unwrap(), bytes);
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_told() {
    let place = Place::new();
    let hub = Server::good(weights(7, 900), COMMIT);
    fs_err::write(place.path("hf"), "a file where a folder should be").unwrap();
    place.fetch(&hub.url(), &[]).expect(4, &["hf/hub", "HF_HUB_CACHE"]);
    assert_eq!(hub.counts().1, 0);
}

#[test]
fn a_lock_file_that_cannot_be_written_is_told_before_the_download() {
    let (place, bytes) = (Place::new(), weights(7, 900));
    let hub = Server::good(bytes.clone(), COMMIT);
    fs_err::write(place.path("file"), "a file where a folder should be").unwrap();
    let mut locks = vec!["file/weights.lock"];
    if cfg!(target_os = "linux") {
        // Nobody makes files there, root neither.
        locks.push("/proc/weights.lock");
    }
    for lock in locks {
        let run = place.fetch(&hub.url(), &["--lock", lock]);
        run.expect(4, &[&format!("lock file `{lock}`"), "`--lock FILE` names another place"]);
        assert!(
            !run.stderr.contains("hint: is there room") && !run.stderr.contains("HF_HUB_CACHE names"),
            "{}",
            run.stderr
        );
        assert_eq!(hub.counts(), (0, 0));
    }
    place.expect_usable(&bytes);
}
