//! Sizes and times as people write them.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp, tz::TimeZone};

const KIB_PER_MIB: u128 = 1024;
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// No job is meant to last longer than a year.
const LONGEST_LIFE: Duration = Duration::from_secs(366 * 24 * 3600);

/// Reads a size of memory, in KiB: `2G`, `512MiB`, `1.5GiB`; a bare number means MiB.
pub(crate) fn memory_kib(text: &str) -> Result<u64, String> {
    let kib = whole(text, 1, "a whole number of KiB")?;
    if kib == 0 {
        Err("a domain cannot have no memory".to_owned())
    } else {
        Ok(kib)
    }
}

/// Reads a bandwidth, in MiB/s: `100MiB`, `1G`, `100MiB/s`; a bare number means MiB/s.
pub(crate) fn bandwidth(text: &str) -> Result<u64, String> {
    let text = text.strip_suffix("/s").unwrap_or(text);
    let mib = whole(text, KIB_PER_MIB, "a whole number of MiB/s")?;
    if mib == 0 {
        Err("a bandwidth of nothing moves nothing".to_owned())
    } else {
        Ok(mib)
    }
}

/// Reads a size as a whole number of units of `unit_kib` KiB.
fn whole(text: &str, unit_kib: u128, what: &str) -> Result<u64, String> {
    let usage =
        || format!("'{text}' is no size; write 512M, 2G or 1536MiB (a bare number means MiB)");
    let at = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let kib: u128 = match unit.trim_start().to_ascii_lowercase().as_str() {
        "k" | "kib" => 1,
        "" | "m" | "mib" => KIB_PER_MIB,
        "g" | "gib" => 1 << 20,
        "t" | "tib" => 1 << 30,
        "kb" | "mb" | "gb" | "tb" => {
            return Err(format!(
                "'{unit}' means powers of 1000 to some and of 1024 to others; write K, M, G or T (powers of 1024)"
            ));
        }
        _ => return Err(usage()),
    };
    let (digits, fraction) = number.split_once('.').unwrap_or((number, ""));
    if digits.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty())
    {
        return Err(usage());
    }
    let too_much = || format!("'{text}' is more than any machine has");
    if digits.len() > 20 || fraction.len() > 9 {
        return Err(too_much());
    }
    let scale = 10u128.pow(u32::try_from(fraction.len()).unwrap_or_default());
    let scaled: u128 = format!("{digits}{fraction}").parse().map_err(|_| usage())?;
    let total = scaled * kib;
    let per_unit = scale * unit_kib;
    if !total.is_multiple_of(per_unit) {
        return Err(format!(
            "'{text}' is not {what}, and nothing is rounded here"
        ));
    }
    // libvirt counts KiB in a signed 64-bit number, and bytes in an unsigned one.
    match u64::try_from(total / per_unit) {
        Ok(units) if total / scale <= u128::from(u64::MAX >> 10) => Ok(units),
        Ok(_) | Err(_) => Err(too_much()),
    }
}

/// Reads a time: `30s`, `2m`, `1h30m`, `500ms`; a bare number means seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    at_most(text, LONGEST, "a day")
}

/// Reads how long a job may last: `2h`, `72h30m`; a bare number means seconds.
pub(crate) fn lifetime(text: &str) -> Result<Duration, String> {
    at_most(text, LONGEST_LIFE, "a year")
}

fn at_most(text: &str, longest: Duration, in_words: &str) -> Result<Duration, String> {
    let bare = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let written = if bare {
        format!("{text}s")
    } else {
        text.to_owned()
    };
    let usage = || format!("'{text}' is no time; write 30s, 2m or 500ms");
    let parsed: SignedDuration = written.parse().map_err(|_| usage())?;
    let time = Duration::try_from(parsed).map_err(|_| usage())?;
    match time {
        Duration::ZERO => Err("no time at all is not enough".to_owned()),
        time if time > longest => Err(format!("'{text}' is more than {in_words}")),
        time => Ok(time),
    }
}

/// Reads a time in milliseconds; it must say its unit.
pub(crate) fn milliseconds(text: &str) -> Result<u64, String> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(format!("'{text}' says no unit; write 300ms or 1s"));
    }
    let time = duration(text)?;
    match u64::try_from(time.as_millis()) {
        Ok(ms) if ms > 0 => Ok(ms),
        Ok(_) | Err(_) => Err(format!("'{text}' is less than a millisecond")),
    }
}

/// Writes a size in KiB for people.
pub(crate) fn size(kib: u64) -> String {
    bytes(u128::from(kib) * 1024)
}

/// Writes a number of bytes for people.
pub(crate) fn bytes(bytes: impl Into<u128>) -> String {
    let bytes = bytes.into();
    let mut unit = 1u128;
    let mut names = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].into_iter();
    let mut name = names.next().unwrap_or_default();
    while bytes >= unit * 1024 {
        let Some(bigger) = names.next() else { break };
        name = bigger;
        unit *= 1024;
    }
    let tenths = (bytes * 10 + unit / 2) / unit;
    match (tenths % 10, tenths / 10) {
        (0, whole) => format!("{whole} {name}"),
        (_, whole) if whole >= 100 => format!("{whole} {name}"),
        (tenth, whole) => format!("{whole}.{tenth} {name}"),
    }
}

/// Writes a span of time for people, its two biggest units.
pub(crate) fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{}.{}s", seconds, time.subsec_millis() / 100),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d{:02}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// How long a domain has been in its state; `-` where it was so before its xmand came to look.
pub(crate) fn since_in_words(since_ms: Option<u64>) -> String {
    let now = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default();
    since_ms.map_or_else(
        || "-".to_owned(),
        |since| age_in_words(Duration::from_millis(now.saturating_sub(since))),
    )
}

/// Nobody needs an age to the tenth of a second.
pub(crate) fn age_in_words(age: Duration) -> String {
    if age.as_secs() < 60 {
        format!("{}s", age.as_secs())
    } else {
        span(age)
    }
}

/// Writes a time in seconds since 1970 in the person's own time zone.
pub(crate) fn moment(seconds: u64) -> String {
    let written = i64::try_from(seconds)
        .ok()
        .and_then(|seconds| Timestamp::from_second(seconds).ok());
    match written {
        Some(time) => time
            .to_zoned(TimeZone::system())
            .strftime("%Y-%m-%d %H:%M:%S")
            .to_string(),
        None => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_xm_people_mean_them() {
        for (text, kib) in [
            ("1024", 1024 * 1024),
            ("2G", 2 << 20),
            ("2GiB", 2 << 20),
            ("2g", 2 << 20),
            ("512MiB", 512 << 10),
            ("512M", 512 << 10),
            ("2048K", 2048),
            ("1kib", 1),
            ("1.5G", 1536 << 10),
            ("0.5", 512),
            ("1T", 1 << 30),
            ("2 GiB", 2 << 20),
        ] {
            assert_eq!(memory_kib(text), Ok(kib), "{text}");
        }
    }

    #[test]
    fn sizes_that_cannot_be_meant_are_refused_with_the_reason() {
        for (text, word) in [
            ("", "no size"),
            ("G", "no size"),
            ("-1G", "no size"),
            ("1..5G", "no size"),
            ("1.G", "no size"),
            (".5G", "no size"),
            ("1e9", "no size"),
            ("2X", "no size"),
            ("0", "no memory"),
            ("0G", "no memory"),
            ("0.1G", "rounded"),
            ("1.5K", "rounded"),
            ("2GB", "powers of 1000"),
            ("500MB", "powers of 1000"),
            ("99999999999999999999T", "more than any machine"),
            ("999999999999999999999999999999", "more than any machine"),
            ("18446744073709551615K", "more than any machine"),
        ] {
            let error = memory_kib(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn bandwidths_are_mib_a_second() {
        assert_eq!(bandwidth("100MiB"), Ok(100));
        assert_eq!(bandwidth("100MiB/s"), Ok(100));
        assert_eq!(bandwidth("100"), Ok(100));
        assert_eq!(bandwidth("1G"), Ok(1024));
        assert!(bandwidth("512K").is_err());
        assert!(bandwidth("0").is_err());
    }

    #[test]
    fn times_are_read_with_their_units() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1h30m"), Ok(Duration::from_secs(5400)));
        for bad in [
            "",
            "0",
            "0s",
            "-1s",
            "x",
            "25h",
            "99999999999999999999",
            "1 fortnight",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert_eq!(lifetime("72h"), Ok(Duration::from_secs(3 * 24 * 3600)));
        assert_eq!(lifetime("90"), Ok(Duration::from_secs(90)));
        for bad in ["", "0s", "9000h", "-1h"] {
            assert!(lifetime(bad).is_err(), "{bad}");
        }
        assert_eq!(milliseconds("300ms"), Ok(300));
        assert_eq!(milliseconds("1s"), Ok(1000));
        for bad in ["300", "1us", "0ms"] {
            assert!(milliseconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_and_spans_are_written_short() {
        assert_eq!(size(2 << 20), "2 GiB");
        assert_eq!(size(512 << 10), "512 MiB");
        assert_eq!(size((1 << 20) + (1 << 19)), "1.5 GiB");
        assert_eq!(size(u64::MAX), "16777216 PiB");
        assert_eq!(bytes(0u64), "0 B");
        assert_eq!(span(Duration::from_millis(12_345)), "12.3s");
        assert_eq!(span(Duration::from_secs(3723)), "1h02m");
        assert_eq!(span(Duration::from_secs(90_000)), "1d01h");
    }

    #[test]
    fn moments_out_of_reach_are_no_panic() {
        assert_eq!(moment(u64::MAX), "-");
        assert!(moment(0).contains("19"));
    }
}
