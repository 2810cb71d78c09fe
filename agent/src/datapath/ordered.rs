//! Digests of a whole file, made while its chunks pass in any order: chunks are handed on in the order of the file,
//! and a thread for each digest works on them.

use super::digests::Whole;
use md5::Md5;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha512};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Chunks that wait for a digest.
const WAITING: usize = 4;

/// A digest of a whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Checksum {
    /// SHA-512.
    Sha512,
    /// MD5.
    Md5,
}

impl Checksum {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sha512 => "sha512",
            Self::Md5 => "md5",
        }
    }
}

/// A piece of the file, in order.
#[derive(Clone)]
enum Piece {
    Zeros(u64),
    Bytes(Arc<Vec<u8>>),
}

/// Takes the chunks of a file in any order and makes digests of the whole.
pub(super) struct Ordered {
    turn: Mutex<Turn>,
    moved: Condvar,
    threads: Vec<JoinHandle<(Checksum, String)>>,
}

struct Turn {
    /// The chunk whose turn it is.
    number: u64,
    /// How far the digests' input goes.
    position: u64,
    outputs: Vec<SyncSender<Piece>>,
    stopped: bool,
}

impl Ordered {
    pub(super) fn new(wanted: &[Checksum]) -> Self {
        let mut outputs = Vec::new();
        let mut threads = Vec::new();
        for &checksum in wanted {
            let (sender, receiver) = sync_channel(WAITING);
            outputs.push(sender);
            threads.push(std::thread::spawn(move || {
                let text = match checksum {
                    Checksum::Sha512 => hex::encode(consume(Sha512::new(), &receiver)),
                    Checksum::Md5 => hex::encode(consume(Md5::new(), &receiver)),
                };
                (checksum, text)
            }));
        }
        let turn = Turn { number: 0, position: 0, outputs, stopped: false };
        Self { turn: Mutex::new(turn), moved: Condvar::new(), threads }
    }

    /// Hands the chunk of that number and offset on when its turn comes, which it waits for. Each number must come
    /// once, and the lowest that is out must not wait for another.
    pub(super) fn pass(&self, number: u64, offset: u64, bytes: &[u8]) {
        let piece = Arc::new(bytes.to_vec());
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.moved.wait_while(turn, |turn| turn.number != number && !turn.stopped);
        let mut turn = waited.unwrap_or_else(PoisonError::into_inner);
        if turn.stopped {
            return;
        }
        turn.zeros_until(offset);
        turn.send(&Piece::Bytes(piece));
        turn.position = offset + bytes.len() as u64;
        turn.number += 1;
        self.moved.notify_all();
    }

    /// Lets everybody go who waits for a turn that does not come.
    pub(super) fn stop(&self) {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner).stopped = true;
        self.moved.notify_all();
    }

    /// The digests of a file of `size_bytes`, once all chunks have passed.
    pub(super) fn finish(self, size_bytes: u64) -> Whole {
        let mut turn = self.turn.into_inner().unwrap_or_else(PoisonError::into_inner);
        turn.zeros_until(size_bytes);
        drop(turn);
        let mut whole = Whole::default();
        for thread in self.threads {
            // A thread that panicked has no digest to give.
            let Ok((checksum, text)) = thread.join() else { continue };
            match checksum {
                Checksum::Sha512 => whole.sha512 = Some(text),
                Checksum::Md5 => whole.md5 = Some(text),
            }
        }
        whole
    }
}

impl Turn {
    fn zeros_until(&mut self, offset: u64) {
        if offset > self.position {
            self.send(&Piece::Zeros(offset - self.position));
            self.position = offset;
        }
    }

    fn send(&self, piece: &Piece) {
        for output in &self.outputs {
            // It fails when the thread is gone, which finish() sees.
            let _ = output.send(piece.clone());
        }
    }
}

fn consume<D: sha2::Digest>(mut hasher: D, pieces: &Receiver<Piece>) -> Vec<u8> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while let Ok(piece) = pieces.recv() {
        match piece {
            Piece::Bytes(bytes) => hasher.update(&*bytes),
            Piece::Zeros(mut rest) => {
                while rest > 0 {
                    let step = rest.min(ZEROS.len() as u64);
                    hasher.update(&ZEROS[..step as usize]);
                    rest -= step;
                }
            }
        }
    }
    hasher.finalize().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_in_any_order_give_the_digests_of_the_file() {
        let mut file = vec![0_u8; 1_000_000];
        let chunks = [(0_u64, 0_usize), (1, 100_000), (2, 500_000), (3, 700_000)];
        for (number, offset) in chunks {
            file[offset..offset + 50_000].fill(number as u8 + 1);
        }
        let ordered = Ordered::new(&[Checksum::Md5, Checksum::Sha512]);
        std::thread::scope(|scope| {
            for (number, offset) in chunks.into_iter().rev() {
                let (ordered, bytes) = (&ordered, &file[offset..offset + 50_000]);
                scope.spawn(move || ordered.pass(number, offset as u64, bytes));
            }
        });
        let whole = ordered.finish(1_000_000);
        assert_eq!(whole.md5, Some(hex::encode(Md5::digest(&file))));
        assert_eq!(whole.sha512, Some(hex::encode(Sha512::digest(&file))));
    }

    #[test]
    fn who_waits_for_a_turn_that_does_not_come_is_let_go() {
        let ordered = Ordered::new(&[Checksum::Md5]);
        std::thread::scope(|scope| {
            scope.spawn(|| ordered.pass(7, 0, &[1]));
            ordered.stop();
        });
        assert_eq!(ordered.finish(0).md5, Some(hex::encode(Md5::digest([]))));
    }
}
