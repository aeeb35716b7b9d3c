//! Locks that outlive a panic, and locks by name.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// Locks a mutex, also where a thread has panicked while it held it: a request that fails must not take the server with it. For what is
/// whole between any two statements, such as counts and tables.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One `L` for each name that is in use.
#[derive(Debug)]
pub struct ByName<K, L>(Mutex<HashMap<K, Weak<L>>>);

impl<K, L> Default for ByName<K, L> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash, L: Default> ByName<K, L> {
    /// Returns how many names are remembered.
    #[cfg(test)]
    pub fn remembered(&self) -> usize {
        lock(&self.0).len()
    }

    /// Returns the one of a name, a new one where nobody has it.
    pub fn of<Q: Eq + Hash + ToOwned<Owned = K> + ?Sized>(&self, name: &Q) -> Arc<L>
    where
        K: Borrow<Q>,
    {
        let mut all = lock(&self.0);
        if let Some(one) = all.get(name).and_then(Weak::upgrade) {
            return one;
        }
        all.retain(|_, one| one.strong_count() > 0);
        let one = Arc::default();
        all.insert(name.to_owned(), Arc::downgrade(&one));
        one
    }
}
