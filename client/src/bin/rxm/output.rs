//! What rxm prints: tables, JSON, YAML and lines on stdout, everything else on stderr.

use std::{
    collections::{BTreeMap, HashSet},
    env,
    io::{self, IsTerminal, Write},
};

use comfy_table::{
    Attribute, Cell, Color, ColumnConstraint, ContentArrangement, Table, Width, presets,
};
use serde_json::{Value, json};
use xman_client::{Address, Explanation, Kind};

use crate::{
    clean,
    options::{Format, Options, When},
};

/// Between two columns, in characters.
const GAP: u16 = 2;
/// The longest field of a table, in characters: JSON has the whole.
const MAX_FIELD: usize = 500;
/// Hosts of one and the same trouble that are named in its line.
const NAMED_HOSTS: usize = 8;

/// Whoever reads stdout has gone, or it is broken.
#[derive(Debug)]
pub(crate) enum Unprinted {
    /// Closed by its reader, who has seen enough: no failure.
    Closed,
    /// A full disk, say.
    Broken(io::Error),
}

impl From<io::Error> for Unprinted {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::Closed
        } else {
            Self::Broken(error)
        }
    }
}

/// How things are printed.
#[derive(Debug)]
pub(crate) struct Output {
    /// The format.
    pub(crate) format: Format,
    /// Whether stdout is a terminal.
    pub(crate) is_terminal: bool,
    /// Whether progress can be drawn on stderr.
    pub(crate) can_draw: bool,
    is_colored: bool,
    /// Whether tables begin with the names of their columns.
    pub(crate) has_headers: bool,
    is_quiet: bool,
}

impl Output {
    pub(crate) fn new(options: &Options) -> Self {
        let is_terminal = io::stdout().is_terminal();
        let refused = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            format: options.output,
            is_terminal,
            can_draw: io::stderr().is_terminal() && !options.quiet,
            is_colored: match options.color {
                When::Always => true,
                When::Never => false,
                When::Auto => is_terminal && !refused,
            },
            has_headers: !options.no_headers,
            is_quiet: options.quiet,
        }
    }

    /// Returns whether the format is for programs.
    pub(crate) fn is_structured(&self) -> bool {
        matches!(self.format, Format::Json | Format::Yaml)
    }

    /// Returns whether somebody wants to hear what goes on.
    pub(crate) fn wants_notes(&self) -> bool {
        !self.is_quiet
    }

    /// Prints text as it is.
    pub(crate) fn raw(&self, text: &str) -> Result<(), Unprinted> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }

    /// Prints text of a host: as it is for programs, harmless for a terminal.
    pub(crate) fn text(&self, text: &str) -> Result<(), Unprinted> {
        if self.is_terminal {
            self.raw(&clean::text(text))
        } else {
            self.raw(text)
        }
    }

    /// Prints one line.
    pub(crate) fn line(&self, line: &str) -> Result<(), Unprinted> {
        self.raw(&format!("{}\n", clean::line(line)))
    }

    /// Prints one line about what went well, unless nobody wants to know.
    pub(crate) fn success(&self, line: &str) -> Result<(), Unprinted> {
        if self.is_quiet {
            Ok(())
        } else {
            self.line(line)
        }
    }

    /// Prints values as JSON or YAML.
    pub(crate) fn values(&self, mut values: Vec<Value>) -> Result<(), Unprinted> {
        if self.is_terminal {
            values.iter_mut().for_each(make_harmless);
        }
        let text = if self.format == Format::Yaml {
            serde_saphyr::to_string(&values).map_err(io::Error::other)?
        } else {
            let mut text = serde_json::to_string_pretty(&values).map_err(io::Error::other)?;
            text.push('\n');
            text
        };
        self.raw(&text)
    }

    /// Prints a table that fits the terminal.
    pub(crate) fn table(&self, headers: &[&str], rows: Vec<Row>) -> Result<(), Unprinted> {
        if rows.is_empty() {
            Ok(())
        } else {
            self.print_table(if self.has_headers { headers } else { &[] }, rows)
        }
    }

    /// Prints lines of a key and its value.
    pub(crate) fn table_without_headers(&self, rows: Vec<Row>) -> Result<(), Unprinted> {
        self.print_table(&[], rows)
    }

    fn print_table(&self, headers: &[&str], rows: Vec<Row>) -> Result<(), Unprinted> {
        let mut text = String::new();
        let width = if self.is_terminal {
            Table::new().width()
        } else {
            None
        };
        for line in self.lay_out(headers, rows, width).lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        self.raw(&text)
    }

    fn lay_out(&self, headers: &[&str], mut rows: Vec<Row>, width: Option<u16>) -> Table {
        rows.iter_mut().for_each(Row::make_harmless);
        let words = longest_words(headers, &rows);
        let needed: usize = words.iter().map(|word| usize::from(word + GAP)).sum();
        // What does not fit in words is easier to read when the terminal breaks it than in columns of fragments.
        let width = width.filter(|width| needed <= usize::from(*width));

        let mut table = Table::new();
        // What it finds out about the terminal by itself is not what was asked for on the command line.
        table.load_preset(presets::NOTHING).force_no_tty();
        match width {
            Some(width) => table
                .set_content_arrangement(ContentArrangement::Dynamic)
                .set_width(width),
            None => table.set_content_arrangement(ContentArrangement::Disabled),
        };
        if self.is_colored {
            table.enforce_styling();
        }
        if !headers.is_empty() {
            table.set_header(
                headers
                    .iter()
                    .map(|header| self.styled(Cell::new(header), Style::Header)),
            );
        }
        for Row { cells, style } in rows {
            let row = cells.into_iter().map(|Field { text, style: own }| {
                self.styled(
                    Cell::new(text),
                    if style == Style::Plain { own } else { style },
                )
            });
            table.add_row(row);
        }
        let last = table.column_count().saturating_sub(1);
        for (at, column) in table.column_iter_mut().enumerate() {
            let gap = if at == last { 0 } else { GAP };
            column.set_padding((0, gap));
            if let (Some(_), Some(word)) = (width, words.get(at)) {
                column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(word + gap)));
            }
        }
        table
    }

    fn styled(&self, cell: Cell, style: Style) -> Cell {
        if !self.is_colored {
            return cell;
        }
        match style {
            Style::Plain => cell,
            Style::Header => cell.add_attribute(Attribute::Bold),
            Style::Good => cell.fg(Color::Green),
            Style::Waiting => cell.fg(Color::Yellow),
            Style::Bad => cell.fg(Color::Red),
            Style::Dim => cell.add_attribute(Attribute::Dim),
        }
    }

    /// Says something about what goes on, on stderr, unless nobody wants to know.
    pub(crate) fn note(&self, text: &str) {
        if !self.is_quiet {
            self.say(text);
        }
    }

    /// Says something on stderr. A stderr that is closed is nobody's trouble.
    pub(crate) fn say(&self, text: &str) {
        let _ = writeln!(io::stderr().lock(), "rxm: {}", clean::line(text));
    }
}

/// The width of the longest word of each column.
fn longest_words(headers: &[&str], rows: &[Row]) -> Vec<u16> {
    let longest = |text: &str| {
        let words = text.split_whitespace().map(|word| word.chars().count());
        u16::try_from(words.max().unwrap_or_default().min(MAX_FIELD)).unwrap_or_default()
    };
    let mut words: Vec<u16> = headers.iter().copied().map(longest).collect();
    for row in rows {
        words.resize(words.len().max(row.cells.len()), 0);
        for (word, field) in words.iter_mut().zip(&row.cells) {
            *word = (*word).max(longest(&field.text));
        }
    }
    words
}

fn make_harmless(value: &mut Value) {
    match value {
        Value::String(text) => *text = clean::text(text).into_owned(),
        Value::Array(values) => values.iter_mut().for_each(make_harmless),
        Value::Object(fields) => fields.values_mut().for_each(make_harmless),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// How a row or a field looks where there are colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Header,
    Good,
    Waiting,
    Bad,
    Dim,
}

/// A field of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    pub(crate) text: String,
    pub(crate) style: Style,
}

impl<T: Into<String>> From<T> for Field {
    fn from(text: T) -> Self {
        Self {
            text: text.into(),
            style: Style::Plain,
        }
    }
}

/// A row of a table; a style other than plain overrides those of its fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) cells: Vec<Field>,
    pub(crate) style: Style,
}

impl Row {
    fn make_harmless(&mut self) {
        for field in &mut self.cells {
            let mut text = clean::line(&field.text).into_owned();
            if let Some((end, _)) = text.char_indices().nth(MAX_FIELD) {
                text.truncate(end);
                text.push_str("...");
            }
            field.text = text;
        }
    }

    pub(crate) fn plain(cells: Vec<Field>) -> Self {
        Self {
            cells,
            style: Style::Plain,
        }
    }
}

/// A host that could not be asked, as JSON has it.
pub(crate) fn error_value(address: &Address, error: &Explanation) -> Value {
    json!({ "host": address, "error": { "code": error.code, "message": error.to_string() } })
}

/// Collects what went wrong: the same trouble of several hosts is one line, and what is common to all is said once.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    waiting: Vec<(String, Vec<String>)>,
    places: BTreeMap<String, usize>,
    said: HashSet<String>,
}

impl Complaints {
    /// Takes one; `about` is a host, or HOST/NAME.
    pub(crate) fn add(&mut self, about: impl Into<String>, error: &Explanation) {
        // Whoever pressed Ctrl-C knows it; what is left behind is worth a word.
        if error.kind == Kind::Interrupted && error.advice.is_empty() {
            return;
        }
        let text = error.to_string();
        if error.is_common {
            if self.said.insert(error.code.to_owned()) {
                self.waiting.push((text, Vec::new()));
            }
            return;
        }
        let place = *self.places.entry(text.clone()).or_insert_with(|| {
            self.waiting.push((text, Vec::new()));
            self.waiting.len() - 1
        });
        if let Some((_, hosts)) = self.waiting.get_mut(place) {
            hosts.push(about.into());
        }
    }

    /// Says what has gathered, each as `rxm: HOST: what happened; what to do`.
    pub(crate) fn say(&mut self, output: &Output) {
        for line in self.lines() {
            output.say(&line);
        }
    }

    fn lines(&mut self) -> Vec<String> {
        self.places.clear();
        let waiting = std::mem::take(&mut self.waiting);
        waiting
            .into_iter()
            .map(|(text, hosts)| {
                if hosts.is_empty() {
                    text
                } else {
                    format!("{}: {text}", named(&hosts))
                }
            })
            .collect()
    }
}

/// Names some of many.
pub(crate) fn named(names: &[String]) -> String {
    match names.get(..NAMED_HOSTS) {
        Some(first) if names.len() > NAMED_HOSTS + 1 => {
            format!(
                "{} and {} more",
                first.join(", "),
                names.len() - NAMED_HOSTS
            )
        }
        Some(_) | None => names.join(", "),
    }
}

pub(crate) fn key_value(key: &str, value: String) -> Row {
    Row::plain(vec![key.into(), value.into()])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> Output {
        Output {
            format: Format::Table,
            is_terminal: false,
            can_draw: false,
            is_colored: false,
            has_headers: true,
            is_quiet: false,
        }
    }

    fn rows() -> Vec<Row> {
        vec![
            Row::plain(vec!["web".into(), "running".into()]),
            Row::plain(vec!["a long name\x1b[2J".into(), "off".into()]),
        ]
    }

    #[test]
    fn tables_have_aligned_columns_and_no_borders() {
        let table = output()
            .lay_out(&["NAME", "STATE"], rows(), None)
            .to_string();
        let lines: Vec<_> = table.lines().map(str::trim_end).collect();
        assert_eq!(
            lines,
            [
                "NAME                  STATE",
                "web                   running",
                "a long name\\u{1b}[2J  off",
            ]
        );
    }

    #[test]
    fn tables_fit_a_narrow_terminal_as_far_as_whole_words_do() {
        let table = |width| {
            output()
                .lay_out(&["NAME", "STATE"], rows(), Some(width))
                .to_string()
        };
        assert!(
            table(24).lines().all(|line| line.chars().count() <= 24),
            "{}",
            table(24)
        );
        assert!(table(5).contains("name\\u{1b}[2J"), "{}", table(5));
    }

    #[test]
    fn a_field_without_end_is_no_panic() {
        let rows = || {
            vec![Row::plain(vec![
                "x ".repeat(100_000).into(),
                "y".repeat(100_000).into(),
            ])]
        };
        for width in [None, Some(0), Some(1), Some(80), Some(u16::MAX)] {
            assert!(
                !output()
                    .lay_out(&["A", "B"], rows(), width)
                    .to_string()
                    .is_empty()
            );
        }
    }

    #[test]
    fn colour_is_there_only_where_it_is_wanted() {
        let row = || {
            vec![Row {
                cells: vec!["web".into()],
                style: Style::Dim,
            }]
        };
        assert!(
            !output()
                .lay_out(&["NAME"], row(), None)
                .to_string()
                .contains('\x1b')
        );
        let colored = Output {
            is_colored: true,
            ..output()
        };
        assert!(
            colored
                .lay_out(&["NAME"], row(), None)
                .to_string()
                .contains('\x1b')
        );
    }

    fn trouble(what: &str, is_common: bool) -> Explanation {
        let what = what.to_owned();
        Explanation {
            kind: Kind::Unreachable,
            code: "x",
            what,
            advice: "do this".to_owned(),
            is_common,
        }
    }

    #[test]
    fn the_same_trouble_is_one_line_and_common_trouble_is_said_once() {
        let mut complaints = Complaints::default();
        complaints.add("a", &trouble("refused", false));
        complaints.add("b", &trouble("silent", false));
        complaints.add("c", &trouble("refused", false));
        complaints.add("d", &trouble("no KDC", true));
        complaints.add("e", &trouble("no KDC", true));
        assert_eq!(
            complaints.lines(),
            [
                "a, c: refused; do this",
                "b: silent; do this",
                "no KDC; do this"
            ]
        );
        complaints.add("f", &trouble("no KDC", true));
        complaints.add("g", &trouble("refused", false));
        assert_eq!(complaints.lines(), ["g: refused; do this"]);
    }

    #[test]
    fn of_many_hosts_some_are_named() {
        let many: Vec<_> = (1..=20).map(|n| format!("h{n}")).collect();
        assert_eq!(named(&many), "h1, h2, h3, h4, h5, h6, h7, h8 and 12 more");
        assert_eq!(named(&many[..9]), "h1, h2, h3, h4, h5, h6, h7, h8, h9");
    }

    #[test]
    fn an_unreachable_host_is_an_object_with_a_code() {
        let value = error_value(&"a:7".parse().unwrap(), &trouble("refused", false));
        assert_eq!(
            value.to_string(),
            r#"{"host":"a:7","error":{"code":"x","message":"refused; do this"}}"#
        );
    }
}
