//! Reads from a domain's XML its name and UUID, puts our metadata in, and refuses what this reader and libvirt's could read differently.

use std::ops::Range;

use roxmltree::{Document, Error, Node, ParsingOptions};
use uuid::Uuid;
use xman_common::{
    name::DomainName,
    protocol::{Code, Fault, MAX_XML, Metadata},
};

use super::{NewDomain, metadata};

/// The most nodes accepted: an XML of a hundred thousand empty elements would cost many times its size in memory.
const MAX_NODES: u32 = 20_000;
/// The deepest nesting accepted, well above any domain's: libvirt's reader stops at 256.
const MAX_DEPTH: usize = 100;

/// Returns which domain an XML describes.
///
/// # Errors
/// `TooLarge` and `BadRequest`, with line and column where they are known.
pub(super) fn parse(xml: &str) -> Result<NewDomain, Fault> {
    if xml.len() > MAX_XML {
        return Err(Fault::new(
            Code::TooLarge,
            format!(
                "the XML has {} bytes; a call carries at most {MAX_XML}",
                xml.len()
            ),
        ));
    }
    let document = document(xml)?;
    described(&document)
}

/// Returns an XML with the element in `<metadata>` that is ours replaced, and every other byte as it was; none takes it away.
///
/// libvirt looks at the first `<metadata>` and the first of its children in our namespace, wherever that is bound: so the new one
/// stands first, and it wins even where the readers should differ on what follows.
///
/// # Errors
/// `BadRequest` for XML that [`parse`] refuses too.
pub(super) fn with_element(xml: &str, element: Option<&str>) -> Result<String, Fault> {
    let document = document(xml)?;
    let root = document.root_element();
    let metadata = only_child(&document, root, "metadata")?;
    let start = start_tag(xml, metadata.unwrap_or(root));
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    if let Some(element) = element {
        edits.push(match metadata {
            None => (
                start.end..start.end,
                format!("<metadata>{element}</metadata>"),
            ),
            Some(_) if start.is_whole => {
                let slash = start.end.saturating_sub("/>".len());
                (slash..start.end, format!(">{element}</metadata>"))
            }
            Some(_) => (start.end..start.end, element.to_owned()),
        });
    }
    edits.extend(ours(metadata).map(|node| (node.range(), String::new())));
    let mut written = String::with_capacity(xml.len() + element.map_or(0, str::len));
    let mut at = 0;
    for (place, text) in edits {
        written.push_str(xml.get(at..place.start).unwrap_or_default());
        written.push_str(&text);
        at = place.end;
    }
    written.push_str(xml.get(at..).unwrap_or_default());
    Ok(written)
}

/// Returns what [`parse`] does, and the owners, class and labels that the XML gives the domain, or why they cannot be read.
///
/// # Errors
/// As [`parse`], but for the size.
pub(super) fn read(xml: &str) -> Result<(NewDomain, Result<Metadata, String>), Fault> {
    let document = document(xml)?;
    let new = described(&document)?;
    let place = only_child(&document, document.root_element(), "metadata")?;
    // The first is what libvirt takes.
    let metadata = match ours(place).next() {
        None => Ok(Metadata::default()),
        // With what is bound further out the element could not be read by itself; ours never needs it.
        Some(element) => metadata::read(xml.get(element.range()).unwrap_or_default()),
    };
    Ok((new, metadata))
}

pub(super) fn document(xml: &str) -> Result<Document<'_>, Fault> {
    if xml.contains('\0') {
        return Err(bad("it holds a NUL"));
    }
    encoding(xml)?;
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: MAX_NODES,
        ..ParsingOptions::default()
    };
    let document = Document::parse_with_options(xml, options).map_err(|error| {
        if matches!(error, Error::DtdDetected) {
            bad("it holds a DOCTYPE; leave it out")
        } else if matches!(error, Error::NodesLimitReached) {
            bad(&format!(
                "it holds more than {MAX_NODES} elements and texts"
            ))
        } else {
            bad(&error.to_string())
        }
    })?;
    depth(&document)?;
    names(xml)?;
    Ok(document)
}

/// The memory that a domain begins with, in KiB; 0 where the XML says none that means anything, which libvirt refuses.
fn memory_kib(root: Node<'_, '_>) -> u64 {
    let said = |tag: &str| {
        let node = root.children().find(|node| node.has_tag_name(tag))?;
        let number: u64 = node.text()?.trim().parse().ok()?;
        // The units of libvirt's manual of the domain XML.
        let bytes = match node.attribute("unit").unwrap_or("KiB") {
            "b" | "bytes" => 1,
            "KB" => 1000,
            "k" | "KiB" => 1 << 10,
            "MB" => 1_000_000,
            "M" | "MiB" => 1 << 20,
            "GB" => 1_000_000_000,
            "G" | "GiB" => 1 << 30,
            "TB" => 1_000_000_000_000,
            "T" | "TiB" => 1_u64 << 40,
            _ => return None,
        };
        Some(number.saturating_mul(bytes).div_ceil(1024))
    };
    said("currentMemory")
        .or_else(|| said("memory"))
        .unwrap_or(0)
}

/// The virtual CPUs that a domain begins with.
fn vcpus(root: Node<'_, '_>) -> u32 {
    let node = root.children().find(|node| node.has_tag_name("vcpu"));
    let said = node.and_then(|node| {
        let number = node.attribute("current").or_else(|| node.text())?;
        number.trim().parse().ok()
    });
    said.unwrap_or(1)
}

fn described(document: &Document<'_>) -> Result<NewDomain, Fault> {
    let root = document.root_element();
    if !root.has_tag_name("domain") || root.tag_name().namespace().is_some() {
        return Err(bad_at(
            document,
            root,
            &format!("it is a <{}>, not a <domain>", root.tag_name().name()),
        ));
    }
    let name =
        only_child(document, root, "name")?.ok_or_else(|| bad("the <domain> has no <name>"))?;
    let name_text = text(document, name)?;
    let name = name_text
        .parse::<DomainName>()
        .map_err(|error| bad_at(document, name, &error.to_string()))?;
    let uuid = only_child(document, root, "uuid")?
        .map(|node| uuid(document, node))
        .transpose()?;
    only_child(document, root, "metadata")?;
    Ok(NewDomain {
        name,
        uuid,
        memory_kib: memory_kib(root),
        vcpus: vcpus(root),
    })
}

/// The elements that are ours, where libvirt looks for them: among the children of `<metadata>`, not inside those of others.
fn ours<'a>(metadata: Option<Node<'a, 'a>>) -> impl Iterator<Item = Node<'a, 'a>> {
    let children = metadata.into_iter().flat_map(|node| node.children());
    children.filter(|child| {
        child.is_element() && child.tag_name().namespace() == Some(metadata::NAMESPACE)
    })
}

/// Where a start tag ends, and whether it is the whole element.
struct StartTag {
    end: usize,
    is_whole: bool,
}

/// Finds the end of an element's start tag, in XML that has been parsed.
fn start_tag(xml: &str, node: Node<'_, '_>) -> StartTag {
    let range = node.range();
    let mut quote = None;
    let mut before = b' ';
    for (at, byte) in xml.bytes().enumerate().take(range.end).skip(range.start) {
        match quote {
            Some(open) if open == byte => quote = None,
            Some(_) => {}
            None if matches!(byte, b'"' | b'\'') => quote = Some(byte),
            None if byte == b'>' => {
                return StartTag {
                    end: at + 1,
                    is_whole: before == b'/',
                };
            }
            None => {}
        }
        before = byte;
    }
    StartTag {
        end: range.end,
        is_whole: false,
    }
}

/// Refuses what the two readers take for different names: libvirt's passes over `xmlns:x=""` and goes on with what x was bound to
/// further out, takes `x:xmlns` for an ordinary attribute, and a colon in front for a part of the name.
fn names(xml: &str) -> Result<(), Fault> {
    if xml.contains("<:") || xml.contains("</:") {
        return Err(bad("an element's name begins with a colon"));
    }
    for (at, found) in xml.match_indices("xmlns") {
        let rest = xml.get(at + found.len()..).unwrap_or_default();
        let is_named = xml.get(..at).is_some_and(|before| before.ends_with(':'));
        if is_named && rest.trim_start().starts_with('=') {
            return Err(bad("an attribute is named 'xmlns' behind a colon"));
        }
        let value = rest
            .strip_prefix(':')
            .map(|rest| rest.trim_start_matches(|c| !" \t\r\n=:<>\"'".contains(c)))
            .and_then(|rest| rest.trim_start().strip_prefix('='))
            .map(str::trim_start);
        if value.is_some_and(|value| value.starts_with("\"\"") || value.starts_with("''")) {
            return Err(bad("it binds a prefix to no namespace"));
        }
    }
    Ok(())
}

/// libvirt's reader obeys a declared encoding, this one does not: in UTF-7 the same bytes are another document.
fn encoding(xml: &str) -> Result<(), Fault> {
    let start = xml.strip_prefix('\u{feff}').unwrap_or(xml);
    let Some((declaration, _)) = start
        .strip_prefix("<?xml")
        .and_then(|rest| rest.split_once("?>"))
    else {
        return Ok(());
    };
    let Some((_, value)) = declaration.split_once("encoding") else {
        return Ok(());
    };
    if value.contains("encoding") {
        return Err(bad("its first line says 'encoding' twice"));
    }
    let value =
        value.trim_matches(|c: char| c.is_ascii_whitespace() || matches!(c, '=' | '"' | '\''));
    let declared = value.split(['"', '\'']).next().unwrap_or_default();
    if ["utf-8", "utf8", "us-ascii"]
        .iter()
        .any(|known| declared.eq_ignore_ascii_case(known))
    {
        return Ok(());
    }
    Err(bad(
        "it declares an encoding other than UTF-8; convert it and declare UTF-8, or nothing",
    ))
}

/// Counts without recursion, since a deep document must not cost stack.
fn depth(document: &Document<'_>) -> Result<(), Fault> {
    let mut level = 0_usize;
    let mut next = document.root().first_child();
    while let Some(node) = next {
        if level > MAX_DEPTH {
            return Err(bad_at(
                document,
                node,
                &format!("it is nested more than {MAX_DEPTH} deep"),
            ));
        }
        if let Some(child) = node.first_child() {
            level += 1;
            next = Some(child);
            continue;
        }
        let mut climbing = node;
        next = loop {
            if let Some(sibling) = climbing.next_sibling() {
                break Some(sibling);
            }
            match climbing.parent() {
                Some(parent) if !parent.is_root() => {
                    level = level.saturating_sub(1);
                    climbing = parent;
                }
                _ => break None,
            }
        };
    }
    Ok(())
}

/// libvirt takes the first of several; two of them are a mistake or a trick.
fn only_child<'a>(
    document: &Document<'_>,
    root: Node<'a, 'a>,
    tag: &str,
) -> Result<Option<Node<'a, 'a>>, Fault> {
    let mut found = root
        .children()
        .filter(|child| child.is_element() && child.tag_name().name() == tag);
    let first = found.next();
    if let Some(second) = found.next() {
        return Err(bad_at(document, second, &format!("a second <{tag}>")));
    }
    match first {
        Some(node) if node.tag_name().namespace().is_some() => Err(bad_at(
            document,
            node,
            &format!("the <{tag}> stands in an XML namespace"),
        )),
        other => Ok(other),
    }
}

/// libvirt takes the text of everything inside, this reader that of the first piece: only plain text is the same to both.
fn text(document: &Document<'_>, node: Node<'_, '_>) -> Result<String, Fault> {
    if node.children().any(|child| !child.is_text()) {
        return Err(bad_at(
            document,
            node,
            &format!("the <{}> holds more than text", node.tag_name().name()),
        ));
    }
    Ok(node.children().filter_map(|child| child.text()).collect())
}

fn uuid(document: &Document<'_>, node: Node<'_, '_>) -> Result<Uuid, Fault> {
    let text = text(document, node)?;
    match Uuid::try_parse(text.trim()) {
        Ok(uuid) if !uuid.is_nil() => Ok(uuid),
        _ => Err(bad_at(
            document,
            node,
            "the <uuid> is none; leave it out and one is made up",
        )),
    }
}

fn bad(what: &str) -> Fault {
    Fault::new(Code::BadRequest, format!("the XML cannot be used: {what}"))
}

fn bad_at(document: &Document<'_>, node: Node<'_, '_>, what: &str) -> Fault {
    bad(&format!(
        "{what} at {}",
        document.text_pos_at(node.range().start)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "123e4567-e89b-12d3-a456-426614174000";

    #[track_caller]
    fn refused(xml: &str, why: &str) {
        let fault = parse(xml).unwrap_err();
        assert_eq!(fault.code, Code::BadRequest, "{fault}");
        assert!(fault.message.contains(why), "{fault}");
    }

    #[test]
    fn a_domain_has_one_name_and_at_most_one_uuid() {
        let plain = parse("<domain type='qemu'><name>web</name></domain>").unwrap();
        assert_eq!((plain.name.as_str(), plain.uuid), ("web", None));
        let full = format!(
            "<?xml version='1.0' encoding='UTF-8'?>\n<domain><uuid>\n{UUID} </uuid><name>a&amp;b</name></domain>"
        );
        let full = parse(&full).unwrap();
        assert_eq!(
            (full.name.as_str(), full.uuid),
            ("a&b", Some(Uuid::try_parse(UUID).unwrap()))
        );
    }

    #[test]
    fn what_libvirt_could_read_differently_is_refused() {
        refused(
            "<domain><name>a</name><name>b</name></domain>",
            "a second <name> at 1:23",
        );
        refused(
            "<domain><name>a<!-- x -->b</name></domain>",
            "more than text",
        );
        refused("<domain><name>a<b>c</b></name></domain>", "more than text");
        refused(
            "<domain><x:name xmlns:x='y'>a</x:name></domain>",
            "namespace",
        );
        refused(
            "<domain xmlns='y'><name>a</name></domain>",
            "not a <domain>",
        );
        refused(
            &format!("<domain><name>a</name><uuid>{UUID}</uuid><uuid>{UUID}</uuid></domain>"),
            "a second <uuid>",
        );
        for declaration in [
            "version='1.0' encoding='UTF-7'",
            "version=\"1.0\" encoding = \"UTF-16\" standalone='yes'",
            "version='1.0' encoding=''",
            "version='1.0encoding=utf-8' encoding='UTF-7'",
        ] {
            refused(
                &format!("<?xml {declaration}?><domain><name>a</name></domain>"),
                "encoding",
            );
        }
    }

    #[test]
    fn bad_xml_is_refused_with_its_place() {
        refused("", "cannot be used");
        refused("no XML at all", "1:1");
        refused("<domain>\n  <name>a</nam>\n</domain>", "2:");
        refused("<network><name>a</name></network>", "it is a <network>");
        refused("<domain/>", "no <name>");
        refused("<domain><name/></domain>", "an empty domain name");
        refused("<domain><name>../x</name></domain>", "cannot hold '/'");
        refused(
            &format!("<domain><name>{UUID}</name></domain>"),
            "looks like a UUID",
        );
        refused(
            "<domain><name>a</name><uuid>zz</uuid></domain>",
            "the <uuid> is none",
        );
        refused(
            "<domain><name>a</name><uuid>00000000-0000-0000-0000-000000000000</uuid></domain>",
            "is none",
        );
        refused("<domain><name>a\0</name></domain>", "NUL");
        refused(
            "<!DOCTYPE d [<!ENTITY a 'b'>]><domain><name>&a;</name></domain>",
            "DOCTYPE",
        );
    }

    #[test]
    fn size_number_and_nesting_are_bounded() {
        assert_eq!(
            parse(&"x".repeat(MAX_XML + 1)).unwrap_err().code,
            Code::TooLarge
        );
        let deep = format!("{}{}", "<a>".repeat(17_000), "</a>".repeat(17_000));
        refused(&deep, "nested more than");
        refused(&"<a>".repeat(40_000), "cannot be used");
        refused(
            &format!("<domain><name>a</name>{}</domain>", "<b/>".repeat(25_000)),
            "more than 20000 elements",
        );
        let fine = format!(
            "<domain><name>a</name>{}{}</domain>",
            "<b>".repeat(90),
            "</b>".repeat(90)
        );
        assert!(parse(&fine).is_ok());
        let wide = format!(
            "<domain><name>a</name>{}</domain>",
            "<b><c/></b>".repeat(5_000)
        );
        assert!(parse(&wide).is_ok());
    }

    const ALICE: &str = "<xman:domain xmlns:xman=\"urn:xman:domain:1\"><xman:owner>alice@EX.ORG</xman:owner></xman:domain>";

    #[track_caller]
    fn replaced(before: &str, element: Option<&str>, after: &str) {
        assert_eq!(with_element(before, element).unwrap(), after);
    }

    #[test]
    fn our_element_is_replaced_and_all_else_stays_byte_for_byte() {
        let plain = "\u{feff}<?xml version='1.0'?>\r\n<!-- <metadata> --><domain a='>' b=\"/>\">\n <name>web</name> </domain>\n";
        replaced(plain, None, plain);
        replaced(
            plain,
            Some(ALICE),
            &plain.replace("\"/>\">", &format!("\"/>\"><metadata>{ALICE}</metadata>")),
        );
        for empty in [
            "<metadata/>",
            "<metadata x='/>' />",
            "<metadata></metadata>",
        ] {
            let xml = format!("<domain><name>web</name>{empty}</domain>");
            replaced(&xml, None, &xml);
            let full = with_element(&xml, Some(ALICE)).unwrap();
            let attribute = if empty.contains("x=") { " x='/>' " } else { "" };
            let expected = format!("<metadata{attribute}>{ALICE}</metadata>");
            assert!(full.contains(&expected), "{full}");
        }
        let others = "<!-- c --><a:app xmlns:a='urn:a'><m xmlns='urn:xman:domain:1'/>&amp;</a:app><![CDATA[<xman:domain/>]]>";
        let with = |ours: &str, after: &str| {
            format!(
                "<domain xmlns:x='urn:xman:domain:1'><name>web</name><metadata>{ours} {others}{after}</metadata></domain>"
            )
        };
        for theirs in [
            "<xman:domain xmlns:xman='urn:xman:domain:1'><xman:owner>mallory@EX.ORG</xman:owner></xman:domain>",
            "<domain xmlns=\"urn:xman&#58;domain&#x3a;1\"/>",
            "<x:domain><owner>mallory@EX.ORG</owner></x:domain>",
            "<x:anything/>",
        ] {
            replaced(&with(theirs, theirs), None, &with("", ""));
            replaced(&with(theirs, theirs), Some(ALICE), &with(ALICE, ""));
            replaced(&with("", theirs), Some(ALICE), &with(ALICE, ""));
        }
        let (new, metadata) = read(&with(ALICE, "")).unwrap();
        assert_eq!(new.name.as_str(), "web");
        assert_eq!(
            metadata.unwrap().owners.first().unwrap().as_str(),
            "alice@EX.ORG"
        );
        assert!(read(&with("<x:domain/>", "")).unwrap().1.is_err());
    }

    #[test]
    fn names_that_libvirt_could_read_differently_are_refused() {
        let with = |metadata: &str| {
            format!("<domain xmlns:x='urn:xman:domain:1'><name>a</name>{metadata}</domain>")
        };
        let inside = |child: &str| with(&format!("<metadata>{child}</metadata>"));
        for (xml, why) in [
            (with("<metadata/><metadata/>"), "a second <metadata>"),
            (with("<x:metadata/>"), "namespace"),
            (with("<metadata xmlns='urn:xman:domain:1'/>"), "namespace"),
            (inside("<x:domain xmlns:x=''/>"), "no namespace"),
            (inside("<x:domain xmlns:x\t=\n \"\"/>"), "no namespace"),
            (
                inside("<d xmlns='urn:xman:domain:1' :xmlns='b'/>"),
                "behind a colon",
            ),
            (
                inside("<d xmlns='urn:xman:domain:1' x:xmlns ='b'/>"),
                "behind a colon",
            ),
            (
                inside("<:domain xmlns='urn:xman:domain:1'></:domain>"),
                "a colon",
            ),
            (inside("<x:y:domain/>"), "cannot be used"),
            (inside("<z:domain/>"), "cannot be used"),
        ] {
            refused(&xml, why);
        }
        let begin = std::time::Instant::now();
        let text = format!("<a>{}</a>", "xmlns:".repeat(MAX_XML / 6 - 10));
        refused(&text, "not a <domain>");
        assert!(begin.elapsed().as_secs() < 2, "{:?}", begin.elapsed());
    }
}
