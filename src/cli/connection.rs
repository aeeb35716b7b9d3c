//! The options every client command shares: which server, which key, which tenant, and how to print.

use std::path::PathBuf;

use super::{Failure, Result};
use crate::api::client::{Client, ClientError, Target};

#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Server")]
pub(super) struct Connection {
    /// The server: http://HOST:PORT or https://HOST:PORT; HOST:PORT alone where it is on this machine.
    #[arg(long, env = "TENORA_SERVER", default_value = "http://127.0.0.1:50051", global = true, value_name = "URL")]
    server: String,
    /// The bearer key. Better set as TENORA_KEY: other users see command lines.
    #[arg(long, env = "TENORA_KEY", hide_env_values = true, global = true)]
    key: Option<String>,
    /// PEM certificate of the authority that signed the server's certificate, for https [default: the system's authorities]
    #[arg(long, visible_alias = "ca", env = "TENORA_TLS_CA", global = true, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// The tenant that short names belong to: `tone` is then tenants/TENANT/adapters/tone.
    #[arg(long, env = "TENORA_TENANT", global = true)]
    tenant: Option<String>,
    /// Print JSON, one object per line.
    #[arg(long, global = true)]
    pub(super) json: bool,
}

impl Connection {
    pub(super) async fn client(&self) -> Result<Client> {
        let target = Target { server: self.server.clone(), key: self.key.clone(), tls_ca: self.tls_ca.clone() };
        Ok(Client::connect(&target).await?)
    }

    /// All of `parent`'s items of a list; `next` gets a page token and gives a page and the token of the one after.
    pub(super) async fn list<T>(
        &self,
        parent: String,
        mut next: impl AsyncFnMut(&Client, String, String) -> Result<(Vec<T>, String), ClientError>,
    ) -> Result<Vec<T>> {
        let client = self.client().await?;
        all_pages(async |page_token| next(&client, parent.clone(), page_token).await).await
    }

    /// `tenants/{t}` of --tenant.
    pub(super) fn parent(&self) -> Result<String> {
        match self.tenant.as_deref() {
            Some(tenant) => Ok(tenant_name(tenant)),
            None => Err(Failure::other(
                "which tenant? give --tenant (or TENORA_TENANT), or names in full: tenants/TENANT/...",
            )),
        }
    }

    /// The full name of something of the tenant: `given` may be full already, or an id within `collection`.
    pub(super) fn name(&self, collection: &str, given: &str) -> Result<String> {
        if given.starts_with("tenants/") {
            return Ok(given.to_owned());
        }
        Ok(format!("{}/{collection}/{given}", self.parent()?))
    }

    /// The tenant of a name, else that of --tenant; and the name's last segment.
    pub(super) fn split(&self, collection: &str, given: &str) -> Result<(String, String)> {
        let name = self.name(collection, given)?;
        match name.split_once(&format!("/{collection}/")) {
            Some((parent, id)) if !id.contains('/') => Ok((parent.to_owned(), id.to_owned())),
            _ => Err(Failure::other(format!(
                "{given:?} is neither an id nor of the form tenants/TENANT/{collection}/ID"
            ))),
        }
    }
}

/// `tenants/{t}` of an id or a name.
pub(super) fn tenant_name(given: &str) -> String {
    if given.starts_with("tenants/") { given.to_owned() } else { format!("tenants/{given}") }
}

/// All items of a list that comes in pages: `next` gets a page token and gives a page and the token of the one after.
pub(super) async fn all_pages<T>(
    mut next: impl AsyncFnMut(String) -> Result<(Vec<T>, String), ClientError>,
) -> Result<Vec<T>> {
    let mut items = Vec::new();
    let mut token = String::new();
    loop {
        let (page, following) = next(token).await?;
        items.extend(page);
        if following.is_empty() {
            return Ok(items);
        }
        token = following;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(tenant: Option<&str>) -> Connection {
        Connection { server: String::new(), key: None, tls_ca: None, tenant: tenant.map(str::to_owned), json: false }
    }

    #[test]
    fn short_names_get_the_tenant() {
        let acme = connection(Some("acme"));
        assert_eq!(acme.name("adapters", "tone").unwrap(), "tenants/acme/adapters/tone");
        assert_eq!(acme.name("adapters", "tone/versions/2").unwrap(), "tenants/acme/adapters/tone/versions/2");
        assert_eq!(acme.name("adapters", "tenants/b/adapters/x").unwrap(), "tenants/b/adapters/x");
        assert_eq!(acme.split("adapters", "tenants/b/adapters/x").unwrap(), ("tenants/b".into(), "x".into()));
        assert!(acme.split("adapters", "x/versions/1").is_err());
        assert!(connection(None).name("adapters", "tone").unwrap_err().to_string().contains("--tenant"));
        assert_eq!(connection(None).name("adapters", "tenants/b/adapters/x").unwrap(), "tenants/b/adapters/x");
    }

    #[tokio::test]
    async fn pages_are_joined() {
        let items = all_pages(async |token: String| match token.as_str() {
            "" => Ok((vec![1, 2], "next".to_owned())),
            _ => Ok((vec![3], String::new())),
        });
        assert_eq!(items.await.unwrap(), [1, 2, 3]);
    }
}
