//! Names of resources (AIP-122), content digests, and the proof that a caller is a tenant.
//!
//! Names are parsed once, where they come in, and are then known to be well-formed:
//!
//! ```
//! use tenora::ids::{AdapterName, Digest, VersionName};
//!
//! let version: VersionName = "tenants/shop/adapters/greeter/versions/3".parse()?;
//! assert_eq!(version.adapter, "tenants/shop/adapters/greeter".parse::<AdapterName>()?);
//! assert_eq!(version.tenant().as_str(), "shop");
//! assert!("tenants/Shop/adapters/greeter".parse::<AdapterName>().is_err());
//!
//! let digest = Digest::of(b"content");
//! assert_eq!(digest.to_string().parse::<Digest>()?, digest);
//! # Ok::<(), tenora::error::Error>(())
//! ```

use std::str::FromStr;
use std::{fmt, io};

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Most characters of one segment of a name.
pub const MAX_ID_LEN: usize = 63;

/// Checks one segment: lower-case letters, digits and dashes, with no dash at either end.
pub fn check_id(field: &str, id: &str) -> Result<()> {
    let ok = !id.is_empty()
        && id.len() <= MAX_ID_LEN
        && id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !id.starts_with('-')
        && !id.ends_with('-');
    if ok {
        Ok(())
    } else {
        Err(Error::invalid_because(
            "INVALID_ID",
            field,
            format!("must be 1 to {MAX_ID_LEN} lower-case letters, digits and dashes, with no dash at either end"),
        ))
    }
}

/// A tenant's id. Knowing one proves nothing; see [`Tenant`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(String);

impl TenantId {
    /// Checks an id.
    pub fn new(id: &str) -> Result<Self> {
        check_id("tenant_id", id)?;
        Ok(Self(id.to_owned()))
    }

    /// Returns the id without `tenants/`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tenants/{}", self.0)
    }
}

impl FromStr for TenantId {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        let id = name.strip_prefix("tenants/").ok_or_else(|| bad_name(name, "tenants/{tenant}"))?;
        check_id("name", id).map_err(|_| bad_name(name, "tenants/{tenant}"))?;
        Ok(Self(id.to_owned()))
    }
}

/// A tenant whose right to act has been checked. Made by `api/auth.rs` from a key and by `store` for a job's row, nowhere else
/// (`tests/architecture.rs`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    id: TenantId,
    weight: u32,
}

impl Tenant {
    /// The caller has just proved it.
    pub fn proven(id: TenantId) -> Self {
        Self { id, weight: 1 }
    }

    /// The same with its weight, as the operator has set it.
    pub fn with_weight(self, weight: u32) -> Self {
        Self { weight, ..self }
    }

    /// Returns the tenant's id.
    pub fn id(&self) -> &TenantId {
        &self.id
    }

    /// Its share of the engine beside others': one of weight 3 gets three times the tokens of one of weight 1.
    pub fn weight(&self) -> u32 {
        self.weight
    }

    /// Refuses names of other tenants, existing or not, with one text.
    pub fn check_owns(&self, owner: &TenantId) -> Result<()> {
        if &self.id == owner { Ok(()) } else { Err(Error::PermissionDenied) }
    }
}

fn bad_name(name: &str, form: &str) -> Error {
    let shown: String = name.chars().take(200).collect();
    Error::invalid_because("INVALID_NAME", "name", format!("{shown:?} is not of the form {form}"))
}

/// A name with one collection below a tenant.
macro_rules! child_name {
    ($(#[$doc:meta])* $type:ident, $collection:literal, $id:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $type {
            /// Whose it is.
            pub tenant: TenantId,
            /// The last segment.
            pub $id: String,
        }

        impl $type {
            /// Makes a name of its parts.
            pub fn new(tenant: &TenantId, $id: &str) -> Result<Self> {
                check_id(concat!(stringify!($id), "_id"), $id)?;
                Ok(Self { tenant: tenant.clone(), $id: $id.to_owned() })
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("{}/", $collection, "/{}"), self.tenant, self.$id)
            }
        }

        impl FromStr for $type {
            type Err = Error;
            fn from_str(name: &str) -> Result<Self> {
                let form = concat!("tenants/{tenant}/", $collection, "/{", stringify!($id), "}");
                match name.split('/').collect::<Vec<_>>()[..] {
                    ["tenants", tenant, $collection, id] => {
                        let tenant = TenantId::new(tenant).map_err(|_| bad_name(name, form))?;
                        Self::new(&tenant, id).map_err(|_| bad_name(name, form))
                    }
                    _ => Err(bad_name(name, form)),
                }
            }
        }
    };
}

child_name!(
    /// `tenants/{t}/adapters/{a}`: mutable, has one live version.
    AdapterName, "adapters", adapter
);
child_name!(
    /// `tenants/{t}/datasets/{d}`.
    DatasetName, "datasets", dataset
);
child_name!(
    /// `tenants/{t}/trainingJobs/{j}`.
    JobName, "trainingJobs", job
);
child_name!(
    /// `tenants/{t}/apiKeys/{k}`.
    KeyName, "apiKeys", key
);

/// `tenants/{t}/adapters/{a}/versions/{v}`: immutable. v counts from 1 within its adapter.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VersionName {
    /// The adapter it is a version of.
    pub adapter: AdapterName,
    /// Its number, from 1.
    pub version: u32,
}

impl VersionName {
    /// Returns whose it is.
    pub fn tenant(&self) -> &TenantId {
        &self.adapter.tenant
    }
}

impl fmt::Display for VersionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/versions/{}", self.adapter, self.version)
    }
}

impl FromStr for VersionName {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        let form = "tenants/{tenant}/adapters/{adapter}/versions/{version}";
        let (adapter, version) = name.split_once("/versions/").ok_or_else(|| bad_name(name, form))?;
        let canonical = !version.starts_with(['0', '+']);
        match version.parse() {
            Ok(version) if canonical => {
                Ok(Self { adapter: adapter.parse().map_err(|_| bad_name(name, form))?, version })
            }
            _ => Err(bad_name(name, form)),
        }
    }
}

/// What a request may name: an adapter for its live version, or one version.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum AdapterRef {
    /// The version that is live when the request is taken.
    Live(AdapterName),
    /// This one.
    Version(VersionName),
}

impl AdapterRef {
    /// Returns whose it is.
    pub fn tenant(&self) -> &TenantId {
        match self {
            Self::Live(adapter) => &adapter.tenant,
            Self::Version(version) => version.tenant(),
        }
    }

    /// Returns the adapter, of whichever version.
    pub fn adapter(&self) -> &AdapterName {
        match self {
            Self::Live(adapter) => adapter,
            Self::Version(version) => &version.adapter,
        }
    }
}

impl fmt::Display for AdapterRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Live(name) => name.fmt(f),
            Self::Version(name) => name.fmt(f),
        }
    }
}

impl FromStr for AdapterRef {
    type Err = Error;
    fn from_str(name: &str) -> Result<Self> {
        if name.contains("/versions/") { name.parse().map(Self::Version) } else { name.parse().map(Self::Live) }
    }
}

/// SHA-256 of some content.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Computes the digest of bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Computes the digest of all that a reader gives, in pieces.
    ///
    /// # Errors
    /// The reader's.
    pub fn of_reader(mut reader: impl io::Read) -> io::Result<Self> {
        let mut hasher = Sha256::new();
        io::copy(&mut reader, &mut hasher)?;
        Ok(hasher.into())
    }

    /// Returns the 64 hex digits.
    pub fn hex(&self) -> String {
        self.0.iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// Its 32 bytes.
impl AsRef<[u8]> for Digest {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl From<Sha256> for Digest {
    fn from(hasher: Sha256) -> Self {
        Self(hasher.finalize().into())
    }
}

/// `sha256:<64 hex digits>`.
impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", &self.hex()[..12])
    }
}

impl FromStr for Digest {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let bad = || Error::invalid_because("INVALID_DIGEST", "digest", "must be sha256: and 64 hex digits");
        let hex = text.strip_prefix("sha256:").filter(|h| h.len() == 64 && h.is_ascii()).ok_or_else(bad)?;
        let mut bytes = [0; 32];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for name in ["tenants/acme/adapters/tone", "tenants/a-1/adapters/x9"] {
            assert_eq!(name.parse::<AdapterName>().unwrap().to_string(), name);
        }
        let version = "tenants/acme/adapters/tone/versions/12";
        assert_eq!(version.parse::<VersionName>().unwrap().to_string(), version);
        assert!(matches!(version.parse::<AdapterRef>().unwrap(), AdapterRef::Version(_)));
    }

    #[test]
    fn bad_names_are_refused() {
        for name in [
            "",
            "tenants/",
            "tenants/A/adapters/x",
            "tenants/a/adapters/../x",
            "tenants/a/adapters/x/versions/01",
            "tenants/a/adapters/x/versions/+1",
            "tenants/a/adapters/x/versions/99999999999",
            "tenants/a/adapters/",
            "tenants/-a/adapters/b",
        ] {
            assert!(name.parse::<AdapterRef>().is_err(), "{name}");
        }
    }

    #[test]
    fn digests_round_trip() {
        let digest = Digest::of(b"tenora");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!("sha256:zz".parse::<Digest>().is_err());
    }
}
