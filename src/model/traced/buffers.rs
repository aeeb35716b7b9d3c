//! Memory of activations that passes use again: a fresh page costs more than most of what is computed on it.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

use crate::sync::lock;

/// A pool of float32 memory. A clone is the same pool.
#[derive(Debug, Clone, Default)]
pub(super) struct Buffers(Arc<Mutex<Pool>>);

#[derive(Debug, Default)]
struct Pool {
    free: Vec<Vec<f32>>,
    /// Of all buffers, in use or free.
    bytes: u64,
}

/// How many times the values asked for a buffer may have.
const MOST_TIMES: usize = 2;

impl Buffers {
    /// Returns `len` values, whatever they are.
    pub fn take(&self, len: usize) -> Buffer {
        let fits = |of: &Vec<f32>| of.len() >= len && of.len() / MOST_TIMES <= len;
        let mut pool = lock(&self.0);
        let found = pool.free.iter().enumerate().filter(|(_, free)| fits(free)).min_by_key(|(_, free)| free.len());
        let values = match found.map(|(i, _)| i) {
            Some(i) => pool.free.swap_remove(i),
            None => {
                pool.bytes += (len * size_of::<f32>()) as u64;
                drop(pool);
                vec![0.0; len]
            }
        };
        Buffer { values, len, home: self.clone() }
    }

    /// Returns `len` zeros.
    pub fn zeros(&self, len: usize) -> Buffer {
        let mut buffer = self.take(len);
        buffer.fill(0.0);
        buffer
    }

    /// Returns the bytes of all buffers, which are the most that were in use, about.
    pub fn bytes(&self) -> u64 {
        lock(&self.0).bytes
    }
}

/// Values of a pool, which take their memory back to it.
#[derive(Debug)]
pub(super) struct Buffer {
    values: Vec<f32>,
    len: usize,
    home: Buffers,
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        lock(&self.home.0).free.push(std::mem::take(&mut self.values));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_came_back_is_used_again_where_it_is_not_much_too_large() {
        let buffers = Buffers::default();
        let place = |buffer: &Buffer| buffer.as_ptr();
        let (large, small) = (buffers.take(100), buffers.take(10));
        let (of_large, of_small) = (place(&large), place(&small));
        drop((large, small));
        let again = buffers.zeros(60);
        assert_eq!((place(&again), again.len()), (of_large, 60));
        assert_eq!(place(&buffers.take(9)), of_small);
        assert_eq!(buffers.take(40).len(), 40, "what is in use is not given twice");
        assert_eq!(buffers.bytes(), 4 * (100 + 10 + 40));
    }
}
