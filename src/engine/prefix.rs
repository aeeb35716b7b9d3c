//! The keys by which KV blocks are found again.
//!
//! What a block holds is a function of the base, the adapter version and all tokens up to its end, and no tenant may learn from another's
//! speed what it has asked. So the key of a block is SHA-256 over exactly these: the root over the [`CacheNamespace`], each block's key over the
//! key before it and the block's own tokens. Nothing else is compared: equal keys mean equal contents.
//!
//! No key holds a name that can come to mean something else, only digests and a tenant's id, which is never given twice. So nothing is
//! to be taken back by name when a version goes live, or a version, an adapter or a tenant is deleted: its blocks are asked for no more,
//! and are the first to be used again.

use sha2::{Digest as _, Sha256};

use crate::ids::{Digest, TenantId};

/// What separates the blocks of equal tokens.
#[derive(Debug, Clone, Copy)]
pub struct CacheNamespace<'a> {
    pub tenant: &'a TenantId,
    pub base: Digest,
    pub template: Digest,
    /// The adapter version's content; `None` is the base.
    pub version: Option<Digest>,
}

impl CacheNamespace<'_> {
    /// Injective: all fields but the last have a fixed size once the tag before the version is known.
    fn root(&self) -> Digest {
        let mut hasher = Sha256::new();
        hasher.update(b"scope");
        hasher.update(self.base);
        hasher.update(self.template);
        match self.version {
            Some(version) => hasher.chain_update([1]).chain_update(version),
            None => hasher.chain_update([0]),
        }
        .chain_update(self.tenant.as_str())
        .into()
    }
}

/// What a page of the KV cache is found by: what its block holds, and for which group of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageKey {
    /// One of [`PrefixHashes::keys`].
    pub block: Digest,
    pub group: usize,
}

/// The keys of the whole blocks of one sequence, from its start.
#[derive(Debug)]
pub struct PrefixHashes {
    root: Digest,
    block_tokens: usize,
    keys: Vec<Digest>,
}

impl Clone for PrefixHashes {
    /// Keeps the room to grow.
    fn clone(&self) -> Self {
        let mut keys = Vec::with_capacity(self.keys.capacity());
        keys.extend_from_slice(&self.keys);
        Self { root: self.root, block_tokens: self.block_tokens, keys }
    }
}

impl PrefixHashes {
    /// The keys of a sequence with these ids, which grows to at most `longest` of them without allocating.
    pub fn new(namespace: &CacheNamespace<'_>, block_tokens: usize, ids: &[u32], longest: usize) -> Self {
        let keys = Vec::with_capacity(longest.max(ids.len()) / block_tokens);
        let mut hashes = Self { root: namespace.root(), block_tokens, keys };
        hashes.extend(ids);
        hashes
    }

    /// Adds the keys of the blocks that have become whole. `ids`: all of the sequence.
    pub fn extend(&mut self, ids: &[u32]) {
        for block in ids.chunks_exact(self.block_tokens).skip(self.keys.len()) {
            let mut hasher = Sha256::new();
            hasher.update(b"block");
            hasher.update(self.keys.last().unwrap_or(&self.root));
            block.iter().for_each(|id| hasher.update(id.to_le_bytes()));
            self.keys.push(hasher.into());
        }
    }

    pub fn keys(&self) -> &[Digest] {
        &self.keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const BLOCK: usize = 4;

    fn keys(namespace: &CacheNamespace<'_>, ids: &[u32]) -> Vec<Digest> {
        PrefixHashes::new(namespace, BLOCK, ids, 0).keys().to_vec()
    }

    /// Every way in which the same tokens must not be taken for the same block.
    #[test]
    fn no_key_is_shared_across_what_separates_blocks() {
        let (a, b) = (TenantId::new("a").unwrap(), TenantId::new("b").unwrap());
        let digest = |text: &str| Digest::of(text.as_bytes());
        let ids: Vec<u32> = (0..8).collect();
        let namespace = CacheNamespace {
            tenant: &a,
            base: digest("base"),
            template: digest("template"),
            version: Some(digest("adapter x, 1")),
        };
        let others = [
            ("itself", namespace),
            ("tenant", CacheNamespace { tenant: &b, ..namespace }),
            ("base", CacheNamespace { base: digest("another base"), ..namespace }),
            ("template", CacheNamespace { template: digest("another template"), ..namespace }),
            ("version", CacheNamespace { version: Some(digest("adapter x, 2")), ..namespace }),
            ("adapter", CacheNamespace { version: Some(digest("adapter y, 1")), ..namespace }),
            ("no adapter", CacheNamespace { version: None, ..namespace }),
            ("fields exchanged", CacheNamespace { base: namespace.template, template: namespace.base, ..namespace }),
            (
                "a version where the base's digest was",
                CacheNamespace { base: digest("adapter x, 1"), version: Some(namespace.base), ..namespace },
            ),
        ];
        let mut seen = HashSet::new();
        for (what, namespace) in others {
            for key in keys(&namespace, &ids) {
                assert!(seen.insert(key), "{what}");
            }
        }
    }

    #[test]
    fn no_key_is_shared_across_tokens_positions_and_parents() {
        let tenant = TenantId::new("a").unwrap();
        let digest = Digest::of(b"");
        let namespace = CacheNamespace { tenant: &tenant, base: digest, template: digest, version: None };
        let sequences: [&[u32]; 6] = [
            &[1, 2, 3, 4, 1, 2, 3, 4], // the same block at two positions
            &[1, 2, 3, 5, 1, 2, 3, 4], // another parent
            &[4, 3, 2, 1],             // another order
            &[1, 2, 3, 4, 1, 2, 4, 3], // another block after the same parent
            &[0x0201, 0x0403, 0, 0],   // bytes that could be read as other ids
            &[0x0403_0201, 0, 0, 0],
        ];
        let mut by_key = std::collections::HashMap::new();
        for ids in sequences {
            for (i, key) in keys(&namespace, ids).into_iter().enumerate() {
                let prefix = &ids[..(i + 1) * BLOCK];
                assert_eq!(*by_key.entry(key).or_insert(prefix), prefix, "one key, one prefix");
            }
        }
        assert_eq!(by_key.len(), 8);
    }

    #[test]
    fn a_chain_grows_as_one_made_at_once_and_holds_whole_blocks_only() {
        let tenant = TenantId::new("a").unwrap();
        let digest = Digest::of(b"");
        let namespace = CacheNamespace { tenant: &tenant, base: digest, template: digest, version: None };
        let ids: Vec<u32> = (0..11).collect();
        let mut grown = PrefixHashes::new(&namespace, BLOCK, &ids[..3], 11);
        let capacity = grown.keys.capacity();
        assert_eq!(grown.clone().keys.capacity(), capacity);
        (3..=11).for_each(|length| grown.extend(&ids[..length]));
        assert_eq!(grown.keys(), keys(&namespace, &ids));
        assert_eq!((grown.keys().len(), grown.keys.capacity()), (2, capacity));
    }
}
