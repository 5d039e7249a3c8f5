//! Answers that a hub does not give, and bytes that are not the promised ones.

use crate::server::{Manner, Reply, Server, sha256};
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
