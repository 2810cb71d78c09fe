//! The text of a scrape, on its way to the scraper in pieces: neither does the scraper wait for the last series, nor has the
//! agent all of them in memory. There can be a hundred thousand.

/// Bytes of a piece, or a line more.
const PIECE_BYTES: usize = 64 * 1024;

/// Where modules write their series.
pub struct Text<'a> {
    piece: String,
    take: &'a mut dyn FnMut(String),
}

impl<'a> Text<'a> {
    /// A text whose pieces are handed to `take` as they become full, and the last when it is dropped.
    pub fn new(take: &'a mut dyn FnMut(String)) -> Self {
        Self { piece: String::new(), take }
    }

    /// Adds to it.
    pub fn push(&mut self, part: &str) {
        self.piece.push_str(part);
        if self.piece.len() >= PIECE_BYTES {
            let next = String::with_capacity(PIECE_BYTES + PIECE_BYTES / 64);
            (self.take)(std::mem::replace(&mut self.piece, next));
        }
    }
}

impl Drop for Text<'_> {
    fn drop(&mut self) {
        if !self.piece.is_empty() {
            (self.take)(std::mem::take(&mut self.piece));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_text() {
        let mut pieces = Vec::new();
        let mut take = |piece| pieces.push(piece);
        let mut text = Text::new(&mut take);
        let lines: Vec<String> = (0..30_000).map(|number| format!("line {number}\n")).collect();
        lines.iter().for_each(|line| text.push(line));
        drop(text);
        assert!(pieces.len() > 3);
        assert!(pieces.iter().all(|piece| (1..PIECE_BYTES + 32).contains(&piece.len())));
        assert_eq!(pieces.concat(), lines.concat());
    }
}
