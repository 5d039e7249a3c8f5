//! Addresses: what belongs to the hub's own host, and what may be asked at all.

use ureq::http::Uri;

/// An `http` or `https` address with a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address(Uri);

impl Address {
    /// Reads an address; `None` for another scheme, for one without host, and for one with a user in it.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let uri: Uri = text.parse().ok()?;
        let known = matches!(uri.scheme_str(), Some("http" | "https"));
        (known && uri.host().is_some_and(|h| !h.is_empty()) && !uri.authority()?.as_str().contains('@'))
            .then_some(Self(uri))
    }

    /// The address that a `Location` header names, seen from here.
    pub(super) fn join(&self, location: &str) -> Option<Self> {
        let scheme = self.0.scheme_str()?;
        let authority = self.0.authority()?;
        if location.starts_with("http://") || location.starts_with("https://") {
            return Self::parse(location);
        }
        if let Some(rest) = location.strip_prefix("//") {
            return Self::parse(&format!("{scheme}://{rest}"));
        }
        if location.starts_with('/') {
            return Self::parse(&format!("{scheme}://{authority}{location}"));
        }
        // Anything with a colon before its first slash would be another scheme.
        if location.is_empty() || location.split('/').next()?.contains(':') {
            return None;
        }
        let folder = self.0.path().rsplit_once('/').map_or("", |(folder, _)| folder);
        Self::parse(&format!("{scheme}://{authority}{folder}/{location}"))
    }

    /// Whether both have one scheme, host and port.
    pub(super) fn same_origin(&self, other: &Self) -> bool {
        let port = |uri: &Uri| uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
        let host = |uri: &Uri| uri.host().unwrap_or_default().to_ascii_lowercase();
        self.0.scheme_str() == other.0.scheme_str()
            && host(&self.0) == host(&other.0)
            && port(&self.0) == port(&other.0)
    }

    /// Whether nobody between can read along.
    pub(super) fn is_https(&self) -> bool {
        self.0.scheme_str() == Some("https")
    }

    /// Whether it is this machine.
    pub(super) fn is_loopback(&self) -> bool {
        let host = self.0.host().unwrap_or_default().trim_matches(['[', ']']);
        host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
    }

    /// The whole address.
    pub(super) fn text(&self) -> String {
        self.0.to_string()
    }

    /// Without the query, where signed addresses carry their signature.
    pub(super) fn without_query(&self) -> String {
        let scheme = self.0.scheme_str().unwrap_or_default();
        let authority = self.0.authority().map_or("", |a| a.as_str());
        format!("{scheme}://{authority}{}", self.0.path())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_seen_from_where_they_were_sent() {
        let from = Address::parse("https://hub.co:8443/org/name/resolve/main/f?x=1").unwrap();
        for (location, expected) in [
            ("https://cdn.net/a?sig=1", "https://cdn.net/a?sig=1"),
            ("//cdn.net/a", "https://cdn.net/a"),
            ("/api/b", "https://hub.co:8443/api/b"),
            ("c", "https://hub.co:8443/org/name/resolve/main/c"),
        ] {
            assert_eq!(from.join(location).unwrap().text(), expected);
        }
        for bad in
            ["", "ftp://x/y", "javascript:alert(1)", "https://", "https://ada:b@x/y", "file:///etc/passwd", "a b"]
        {
            assert_eq!(from.join(bad), None, "{bad}");
        }
        assert_eq!(Address::parse("https://cdn.net/a?sig=secret").unwrap().without_query(), "https://cdn.net/a");
    }

    #[test]
    fn a_host_is_its_scheme_name_and_port() {
        let address = |text: &str| Address::parse(text).unwrap();
        let hub = address("https://hub.co/x");
        assert!(hub.same_origin(&address("https://HUB.co:443/y")));
        for other in ["http://hub.co/x", "https://hub.co:444/x", "https://hub.co.evil.net/x", "https://cdn.hub.co/x"] {
            assert!(!hub.same_origin(&address(other)), "{other}");
        }
        for here in ["http://127.0.0.1:80/", "http://localhost/", "http://[::1]:5/", "http://127.9.9.9/"] {
            assert!(address(here).is_loopback(), "{here}");
        }
        for there in ["http://128.0.0.1/", "http://localhost.net/", "http://127.0.0.1.net/"] {
            assert!(!address(there).is_loopback(), "{there}");
        }
    }
}
