//! Memory of activations that passes use again: a fresh page costs more than most of what is computed on it.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

use crate::sync::lock;

/// A pool of float32 memory. A clone is the same pool.
#[derive(Debug, Clone)]
pub(super) struct Buffers(Arc<Mutex<Pool>>);

#[derive(Debug)]
struct Pool {
    /// Those that came back first are first.
    free: Vec<Vec<f32>>,
    /// Bytes of all buffers, in use or free.
    bytes: u64,
    /// The most that they have ever been.
    peak: u64,
    /// Bytes above which nothing free is kept.
    room: u64,
}

/// The part of the values asked for that a buffer may have more of: what is lent too large is missing elsewhere.
const SPARE: usize = 4;

impl Pool {
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let fits = |of: &Vec<f32>| (len..=len + len / SPARE).contains(&of.len());
        let found = self.free.iter().enumerate().filter(|(_, free)| fits(free)).min_by_key(|(_, free)| free.len());
        let place = found.map(|(i, _)| i)?;
        Some(self.free.remove(place))
    }

    /// Counts a new buffer, and gives up free ones that there is no room for beside it, which it returns.
    fn add(&mut self, len: usize) -> Vec<Vec<f32>> {
        self.bytes += bytes(len);
        let mut given_up = Vec::new();
        while self.bytes > self.room && !self.free.is_empty() {
            let old = self.free.remove(0);
            self.bytes -= bytes(old.len());
            given_up.push(old);
        }
        self.peak = self.peak.max(self.bytes);
        given_up
    }
}

fn bytes(len: usize) -> u64 {
    (len * size_of::<f32>()) as u64
}

impl Buffers {
    /// Returns an empty pool, which keeps what comes back as long as all of it is at most so many bytes.
    pub fn new(room: u64) -> Self {
        Self(Arc::new(Mutex::new(Pool { free: Vec::new(), bytes: 0, peak: 0, room })))
    }

    /// Returns `len` values, whatever they are.
    pub fn take(&self, len: usize) -> Buffer {
        let mut pool = lock(&self.0);
        let values = match pool.take(len) {
            Some(values) => values,
            None => {
                let given_up = pool.add(len);
                drop(pool);
                drop(given_up);
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

    /// Returns the most bytes that there were at a time, in use or free.
    pub fn peak(&self) -> u64 {
        lock(&self.0).peak
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
        let buffers = Buffers::new(u64::MAX);
        let place = |buffer: &Buffer| buffer.as_ptr();
        let (large, small) = (buffers.take(100), buffers.take(10));
        let (of_large, of_small) = (place(&large), place(&small));
        drop((large, small));
        let again = buffers.zeros(90);
        assert_eq!((place(&again), again.len()), (of_large, 90));
        assert_eq!(place(&buffers.take(9)), of_small);
        assert_eq!(buffers.take(40).len(), 40, "what is in use is not given twice");
        assert_eq!(buffers.peak(), 4 * (100 + 10 + 40));
    }

    #[test]
    fn what_is_free_is_given_up_for_what_there_is_no_room_for_beside_it() {
        let buffers = Buffers::new(4 * 100);
        drop((buffers.take(30), buffers.take(60)));
        let _small = [buffers.take(10), buffers.take(12)];
        let _again = buffers.take(60);
        assert_eq!(buffers.peak(), 4 * 100, "the one that came back first has gone");
        let _large = buffers.take(200);
        assert_eq!(buffers.peak(), 4 * (10 + 12 + 60 + 200), "what is in use is never refused");
    }
}
