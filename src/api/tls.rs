//! The server's certificate, read again when its files change.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::config::TlsFiles;
use crate::error::{Error, Result};
use crate::sync::lock;

/// How often a handshake looks whether the files have changed.
const LOOK: Duration = Duration::from_secs(2);

/// When each of the two files was changed last; `None` where it cannot be told.
type Changed = [Option<SystemTime>; 2];

/// A certificate and its key, as the files have them.
pub struct Certificate {
    files: TlsFiles,
    state: Mutex<State>,
}

struct State {
    acceptor: TlsAcceptor,
    /// Of the files that the acceptor was made of.
    changed: Changed,
    /// Of the files that were not sound when they were read last.
    refused: Option<Changed>,
    looked: Instant,
}

impl Certificate {
    /// Reads the files.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where they are no certificate and its key.
    pub fn read(files: &TlsFiles) -> Result<Self> {
        let (changed, acceptor) = (changed(files), read(files)?);
        let state = Mutex::new(State { acceptor, changed, refused: None, looked: Instant::now() });
        Ok(Self { files: files.clone(), state })
    }

    /// Returns what the next handshake is made with. New files are taken over; where they are not sound, as while one of the two has been
    /// replaced, what was read before stays.
    pub fn acceptor(&self) -> TlsAcceptor {
        let mut state = lock(&self.state);
        if state.looked.elapsed() >= LOOK {
            state.looked = Instant::now();
            let changed = changed(&self.files);
            if changed != state.changed {
                match read(&self.files) {
                    Ok(acceptor) => {
                        (state.acceptor, state.changed, state.refused) = (acceptor, changed, None);
                        tracing::info!(file = %self.files.cert.display(), "the certificate was read again");
                    }
                    // Tried again, since another change may not show in their times; said once.
                    Err(error) if state.refused != Some(changed) => {
                        state.refused = Some(changed);
                        tracing::warn!(%error, "the certificate stays as it was; its files have changed");
                    }
                    Err(_) => {}
                }
            }
        }
        state.acceptor.clone()
    }
}

fn changed(files: &TlsFiles) -> Changed {
    [&files.cert, &files.key].map(|path| std::fs::metadata(path).and_then(|file| file.modified()).ok())
}

fn read(files: &TlsFiles) -> Result<TlsAcceptor> {
    let read = |flag: &str, path: &std::path::Path| {
        std::fs::read(path).map_err(|e| Error::invalid(flag, format!("{} cannot be read: {e}", path.display())))
    };
    let (cert, key) = (read("--tls-cert", &files.cert)?, read("--tls-key", &files.key)?);
    let bad = |why: String| {
        let (cert, key) = (files.cert.display(), files.key.display());
        let message = format!("{cert} and {key} are not a PEM certificate and its private key: {why}");
        Error::invalid("--tls-cert", message)
    };
    let chain: Vec<_> =
        CertificateDer::pem_slice_iter(&cert).collect::<Result<_, _>>().map_err(|e| bad(format!("{e:?}")))?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|e| bad(format!("{e:?}")))?;
    let config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key);
    let mut config = config.map_err(|e| bad(e.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
