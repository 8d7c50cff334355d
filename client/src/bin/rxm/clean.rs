//! Nothing that a host sends reaches a terminal as a command to it.

use std::borrow::Cow;

/// Control characters of both sets, separators of lines and paragraphs, and marks that turn the direction of text.
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Returns one line in which everything dangerous is written as its escape.
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    escape(text, is_dangerous)
}

/// Returns text in which everything dangerous but newline and tab is written as its escape; a carriage return before a newline is dropped.
pub(crate) fn text(text: &str) -> Cow<'_, str> {
    let text = if text.contains("\r\n") {
        Cow::Owned(text.replace("\r\n", "\n"))
    } else {
        Cow::Borrowed(text)
    };
    match escape(&text, |c| is_dangerous(c) && !matches!(c, '\n' | '\t')) {
        Cow::Borrowed(_) => text,
        Cow::Owned(escaped) => Cow::Owned(escaped),
    }
}

fn escape(text: &str, is_bad: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_bad) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_bad(c) {
            escaped.extend(c.escape_default())
        } else {
            escaped.push(c)
        }
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stays_one_line_and_commands_nothing() {
        assert_eq!(line("Bücher 7"), "Bücher 7");
        assert_eq!(line("a\x1b[2Jb"), "a\\u{1b}[2Jb");
        assert_eq!(line("a\nb\r\tc\0"), "a\\nb\\r\\tc\\u{0}");
        assert_eq!(line("a\u{9b}31mb\u{202e}c"), "a\\u{9b}31mb\\u{202e}c");
        assert!(matches!(line("plain"), Cow::Borrowed(_)));
    }

    #[test]
    fn text_keeps_its_lines_and_tabs() {
        assert_eq!(
            text("a\n\tb\r\nc\x1b]0;x\x07"),
            "a\n\tb\nc\\u{1b}]0;x\\u{7}"
        );
        assert_eq!(text("over\rwritten"), "over\\rwritten");
    }
}
