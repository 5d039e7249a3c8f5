//! What the program does when the hub says no, says later, or is not there.

use std::net::TcpListener;
use std::time::Duration;

use crate::server::{Manner, Reply, Server};
use crate::{COMMIT, NAME, Place, TOKEN, weights};

#[test]
fn no_is_told_at_once_with_the_way_out() {
    for (status, words) in [
        (401, ["answered 401", "HF_TOKEN"]),
        (403, ["answered 403", "licence"]),
        (404, ["does not exist", "answered 404"]),
        (418, ["status 418", "expected 200"]),
    ] {
        let place = Place::new();
        let hub = Server::start(move |_, _| Reply::status(status));
        place
            .fetch(&hub.url(), &[])
            .expect(4, &words)
            .expect(4, &["`model.safetensors` of timm/resnet34.tv_in1k at main"]);
        assert_eq!(hub.counts(), (1, 0), "{status} was tried again");
        assert_eq!(place.lock(), "");
        place.expect_usable(&weights(1, 5000));
    }
}

#[test]
fn later_is_tried_again_a_few_times() {
    let bytes = weights(2, 5000);
    for status in [429, 500, 502, 503, 504] {
        let place = Place::new();
        let hub = Server::start(move |_, _| Reply::status(status));
        place.fetch(&hub.url(), &["--retries", "2"]).expect(4, &[&format!("answered {status}")]);
        assert_eq!(hub.counts(), (3, 0));
        // Once busy, then good; both where the file is described and where it is sent.
        let served = bytes.clone();
        let hub = Server::start(
            move |request, n| {
                if n % 2 == 0 { Reply::status(status) } else { Reply::file(request, &served, COMMIT) }
            },
        );
        place.fetch(&hub.url(), &[]).expect(0, &["downloaded"]);
        assert_eq!(hub.counts(), (2, 2));
        place.expect_usable(&bytes);
    }
}

#[test]
fn the_hub_may_say_how_long_to_wait_within_reason() {
    let bytes = weights(3, 5000);
    let place = Place::new();
    let served = bytes.clone();
    let hub = Server::start(move |request, n| match n {
        0 => Reply::status(429).with("Retry-After", "1"),
        _ => Reply::file(request, &served, COMMIT),
    });
    let run = place.fetch(&hub.url(), &[]);
    run.expect(0, &["downloaded"]);
    assert!(run.took >= Duration::from_secs(1), "{:?}", run.took);

    let place = Place::new();
    let hub = Server::start(|_, _| Reply::status(429).with("Retry-After", "3600"));
    let run = place.fetch(&hub.url(), &[]);
    run.expect(4, &["answered 429 and asks to wait 3600 s"]);
    assert!(run.took < Duration::from_secs(3), "{:?}", run.took);
    assert_eq!(hub.counts(), (1, 0));
    for odd in ["-1", "soon", "Wed, 21 Oct 2065 07:28:00 GMT", "99999999999999999999999"] {
        let hub = Server::start(move |_, _| Reply::status(429).with("Retry-After", odd));
        place.fetch(&hub.url(), &["--retries", "1"]).expect(4, &["answered 429"]);
        assert_eq!(hub.counts(), (2, 0), "{odd}");
    }
    place.expect_usable(&bytes);
}

#[test]
fn a_hub_that_is_not_there_or_says_nothing_is_left() {
    let bytes = weights(4, 300_000);
    let place = Place::new();
    // A port nobody listens on.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    place.fetch(&format!("http://127.0.0.1:{port}"), &[]).expect(4, &["refused", "check the network"]);
    place.fetch("http://hub.invalid", &[]).expect(4, &["http://hub.invalid/timm"]);
    // Accepts and never answers, by the variable and by the option.
    let hub = Server::start(|_, _| Reply::status(200).sent(Manner::Silent));
    let run = place.fetch(&hub.url(), &["--retries", "1"]);
    run.expect(4, &["nothing came for 600ms"]);
    assert!(run.took < Duration::from_secs(6), "{:?}", run.took);
    assert_eq!(hub.counts(), (2, 0));
    let run = place.fetch(&hub.url(), &["--retries", "0", "--timeout", "0.2"]);
    run.expect(4, &["200ms", "hint: allow more with `--timeout SECONDS`"]);
    assert!(run.took < Duration::from_secs(3), "{:?}", run.took);
    // Answers the description only.
    let served = bytes.clone();
    let hub = Server::start(move |request, _| {
        let reply = Reply::file(request, &served, COMMIT);
        if request.method == "GET" { reply.sent(Manner::Silent) } else { reply }
    });
    place.fetch(&hub.url(), &["--retries", "0"]).expect(4, &["nothing came for 600ms"]);
    place.expect_usable(&bytes);
}

#[test]
fn a_body_that_stands_still_or_drips_is_left() {
    let bytes = weights(5, 300_000);
    for manner in [Manner::StallAfter(0), Manner::StallAfter(150_000), Manner::Drip(Duration::from_millis(50))] {
        let place = Place::new();
        let served = bytes.clone();
        let hub = Server::start(move |request, _| {
            let reply = Reply::file(request, &served, COMMIT);
            if request.header("range").is_some() { reply.sent(Manner::StallAfter(0)) } else { reply.sent(manner) }
        });
        let run = place.fetch(&hub.url(), &["--retries", "1"]);
        run.expect(4, &["hint: allow more with `--timeout SECONDS`"]);
        assert!(run.took < Duration::from_secs(8), "{manner:?}: {:?}", run.took);
        assert_eq!(hub.counts(), (1, 2));
        place.expect_usable(&bytes);
    }
    // Headers that drip: the whole answer has its time.
    let place = Place::new();
    let hub = Server::start(|_, _| {
        Reply { status: 0, ..Reply::status(0) }
            .carrying(vec![b'H'; 1000])
            .sent(Manner::Drip(Duration::from_millis(100)))
    });
    let run = place.run({
        let mut command = place.command(&hub.url(), &[NAME, "--retries", "0"]);
        command.env("HF_HUB_ETAG_TIMEOUT", "1");
        command
    });
    run.expect(4, &[]);
    assert!(run.took < Duration::from_secs(5), "{:?}", run.took);
}

#[test]
fn offline_opens_no_connection() {
    let (place, bytes) = (Place::new(), weights(6, 9000));
    let hub = Server::good(bytes, COMMIT);
    let offline = |place: &Place, args: &[&str]| {
        let mut command = place.command(&hub.url(), &[&[NAME], args].concat());
        command.env("HF_HUB_OFFLINE", "1");
        place.run(command)
    };
    offline(&place, &[]).expect(4, &["HF_HUB_OFFLINE is set", "is not in the cache", "pass the path of a file"]);
    offline(&place, &["--revision", COMMIT]).expect(4, &["HF_HUB_OFFLINE is set"]);
    assert_eq!(hub.seen().len(), 0);
    place.fetch(&hub.url(), &[]).expect(0, &[]);
    let asked = hub.seen().len();
    offline(&place, &[]).expect(0, &["in the cache"]);
    // Without a lock, what main was when it was last fetched.
    fs_err::remove_file(place.path("weights.lock")).unwrap();
    offline(&place, &[]).expect(0, &["in the cache", "trusted on first use"]);
    offline(&place, &["--revision", "other"]).expect(4, &["at other is not in the cache"]);
    assert_eq!(hub.seen().len(), asked);
    assert!(place.lock().contains(COMMIT));
}

#[test]
fn a_token_that_comes_back_is_not_shown() {
    // The hub itself knows the token; what it says with it must not reach the screen.
    let echoes: [fn(Reply, &str) -> Reply; 5] = [
        |reply, secret| reply.with("ETag", secret),
        |reply, secret| reply.with("X-Repo-Commit", secret),
        |reply, secret| reply.with("Content-Length", secret),
        |_, secret| Reply::status(302).with("Location", &format!("ftp://{secret}")),
        |_, secret| Reply::status(302).with("Location", &format!("/{secret}/x")),
    ];
    for echo in echoes {
        let place = Place::new();
        let hub = Server::start(move |request, _| {
            let secret = request.header("authorization").unwrap_or("Bearer none").strip_prefix("Bearer ").unwrap();
            echo(Reply::file(request, &weights(1, 900), COMMIT), secret)
        });
        place.fetch(&hub.url(), &["--retries", "0"]).expect(4, &[]);
        assert!(hub.seen()[0].header("authorization").unwrap().contains(TOKEN));
    }
    let place = Place::new();
    let hub = Server::start(|_, _| {
        Reply::status(403).carrying(format!("{TOKEN} is wrong").into_bytes()).with("X-Error-Message", TOKEN)
    });
    place.fetch(&hub.url(), &[]).expect(4, &["the token that is set was sent"]);
}

#[test]
fn a_token_in_a_long_address_is_taken_out_before_the_address_is_cut() {
    for len in 255..275 {
        let place = Place::new();
        let hub = Server::start(move |request, _| {
            let secret = request.header("authorization").unwrap_or("Bearer none").strip_prefix("Bearer ").unwrap();
            match request.path.contains("xxx") {
                true => Reply::status(404),
                false => Reply::status(302).with("Location", &format!("/{}/{secret}/more", "x".repeat(len))),
            }
        });
        place.fetch(&hub.url(), &["--retries", "0"]).expect(4, &["answered 404"]);
    }
}

#[test]
fn another_host_that_says_no_is_not_taken_for_the_hub() {
    for status in [401, 403] {
        let (place, bytes) = (Place::new(), weights(7, 5000));
        let store = Server::start(move |_, _| Reply::status(status));
        let (location, served) = (store.url(), bytes.clone());
        let hub = Server::start(move |_, _| Reply::elsewhere(&served, COMMIT, &location));
        let run = place.fetch(&hub.url(), &[]);
        run.expect(4, &[&format!("answered {status}"), &store.url(), "another host than the hub"]);
        assert!(!run.stderr.contains("licence") && !run.stderr.contains("set HF_TOKEN"), "{}", run.stderr);
        place.expect_usable(&bytes);
    }
}

#[test]
fn settings_that_cannot_be_meant_end_with_code_2() {
    let place = Place::new();
    let hub = Server::good(weights(1, 900), COMMIT);
    place.fetch("no-address", &[]).expect(2, &["HF_ENDPOINT"]);
    place.fetch(&hub.url(), &["--timeout", "never"]).expect(2, &["--timeout", "`never`"]);
    place.fetch(&hub.url(), &["--revision", "../../x"]).expect(2, &["revision", "`../../x`"]);
    place.fetch(&hub.url(), &["--sha256", "12"]).expect(2, &["sha256", "64 hexadecimal digits"]);
    let mut command = place.command(&hub.url(), &[NAME]);
    command.env("HF_TOKEN", format!("{TOKEN}\nX-Evil: 1"));
    place.run(command).expect(2, &["HF_TOKEN"]);
    let lock = place.path("weights.lock");
    let pin = |file: &str| {
        format!(
            "version = 1\n[weights.\"{NAME}\"]\nrepo = \"timm/resnet34.tv_in1k\"\nfile = \"{file}\"\nrevision = \"main\"\n\
         commit = \"{COMMIT}\"\nsha256 = \"{}\"\nsize = 5\n",
            "1".repeat(64)
        )
    };
    for bad in ["not toml", "version = 9\n", &pin("../../../../etc/passwd"), &pin("/etc/passwd")] {
        fs_err::write(&lock, bad).unwrap();
        place.fetch(&hub.url(), &[]).expect(2, &[]);
    }
    assert_eq!(hub.seen().len(), 0);
}
