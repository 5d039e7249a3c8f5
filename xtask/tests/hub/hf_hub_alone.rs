//! Why hf-hub's own download is not called: what it does with the same faults. When a release mends one of these, this
//! test fails, and `xtask::hub` can hand that part back.

use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder};

use crate::server::{Manner, Reply, Server, sha256};
use crate::{COMMIT, FOLDER, TOKEN, weights};

fn api(server: &Server, cache: &std::path::Path) -> Api {
    let builder = ApiBuilder::from_cache(hf_hub::Cache::new(cache.into())).with_endpoint(server.url());
    builder.with_token(Some(TOKEN.into())).with_progress(false).build().unwrap()
}

fn download(server: &Server, cache: &std::path::Path) -> Option<Vec<u8>> {
    let path = api(server, cache).model("timm/resnet34.tv_in1k".into()).download("model.safetensors").ok()?;
    Some(fs_err::read(path).unwrap())
}

#[test]
fn what_hf_hub_alone_does() {
    let bytes = weights(1, 300_000);
    let dir = tempfile::tempdir().unwrap();
    let cache = |part: &str| dir.path().join(part).join("hub");

    let good = Server::good(bytes.clone(), COMMIT);
    assert_eq!(download(&good, &cache("good")).unwrap(), bytes, "the good case works");

    // A body whose hash is not the ETag's is kept.
    let served = bytes.clone();
    let flipped = Server::start(move |request, _| {
        let mut reply = Reply::file(request, &served, COMMIT);
        reply.body[0] ^= 1;
        reply
    });
    assert_ne!(download(&flipped, &cache("flipped")).unwrap(), bytes);

    // So is half a body.
    let served = bytes.clone();
    let half = Server::start(move |request, _| {
        let reply = Reply::file(request, &served, COMMIT);
        let n = reply.body.len().div_ceil(2);
        let body = reply.body[..n].to_vec();
        reply.carrying(body)
    });
    assert_eq!(download(&half, &cache("half")).unwrap().len(), 150_000);

    // A partial file of anything is continued.
    let stale = cache("stale").join(FOLDER).join("blobs").join(format!("{}.part", sha256(&bytes)));
    fs_err::create_dir_all(stale.parent().unwrap()).unwrap();
    fs_err::write(&stale, weights(2, 1000)).unwrap();
    assert_ne!(download(&good, &cache("stale")).unwrap(), bytes);

    // An ETag names a path outside the cache.
    let served = bytes.clone();
    let escaping =
        Server::start(move |request, _| Reply::file(request, &served, COMMIT).with("ETag", "\"../../../../escaped\""));
    download(&escaping, &cache("escaping"));
    assert!(dir.path().join("escaped").exists());

    // The token goes to the host that a redirect names.
    let served = bytes.clone();
    let store = Server::start(move |request, _| Reply::file(request, &served, COMMIT));
    let (location, served) = (store.url(), bytes.clone());
    let hub = Server::start(move |_, _| Reply::elsewhere(&served, COMMIT, &location));
    download(&hub, &cache("redirect"));
    assert!(store.seen().iter().any(|r| r.header("authorization").is_some_and(|v| v.contains(TOKEN))));

    // A hub that never answers is waited for.
    let silent = Server::start(|_, _| Reply::status(200).sent(Manner::Silent));
    let (sent, ended) = std::sync::mpsc::channel();
    let (waiting, folder) = (api(&silent, &cache("silent")), cache("silent"));
    std::thread::spawn(move || {
        let _ = waiting.model("timm/resnet34.tv_in1k".into()).download("model.safetensors");
        drop(folder);
        let _ = sent.send(());
    });
    assert!(ended.recv_timeout(Duration::from_secs(2)).is_err());
}
