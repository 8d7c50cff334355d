//! What xmand keeps with a domain: its owners, class and labels, as one element among the children of libvirt's `<metadata>`.
//!
//! ```xml
//! <xman:domain xmlns:xman="urn:xman:domain:1">
//!   <xman:owner>alice@EXAMPLE.ORG</xman:owner>
//!   <xman:class>grid</xman:class>
//!   <xman:label name="tier">prod</xman:label>
//! </xman:domain>
//! ```
//! Owners and labels come in any number and any order, none twice; there is at most one class. White space between the elements means
//! nothing, inside an owner, class or label every character counts. libvirt gives the element out, and takes it in, without its
//! namespace; both forms mean the same. Whatever else is found is an error, never left out: rules rest on it.

use roxmltree::{Document, Error, Node, ParsingOptions};
use xman_common::{
    name::BadName,
    protocol::{Code, Fault, MAX_METADATA, Metadata},
};
use xman_policy::Lease;

use super::Change;

/// The element's XML namespace; another form of it would get another number.
pub(super) const NAMESPACE: &str = "urn:xman:domain:1";
/// The prefix that the namespace is bound to.
pub(super) const PREFIX: &str = "xman";
/// The longest element that is read, in bytes: what [`MAX_METADATA`] can come to with its markup, and a bound for what others put there.
const MAX_ELEMENT: usize = 256 * 1024;
/// The most elements and texts that are read: a crowd of empty elements would cost many times its size in memory.
const MAX_NODES: u32 = 8192;
/// The most that a message repeats of what it found, in characters.
const MAX_SHOWN: usize = 120;
/// The labels that stand for a lease.
const LEASE_USER: &str = "lease-user";
const LEASE_JOB: &str = "lease-job";

/// Returns the element as it stands in a domain's XML.
pub(super) fn write(metadata: &Metadata) -> String {
    formed(
        metadata,
        "xman:",
        &format!(" xmlns:{PREFIX}=\"{NAMESPACE}\""),
    )
}

/// Returns the element without its namespace, as virDomainSetMetadata takes it and puts the namespace in.
pub(super) fn write_bare(metadata: &Metadata) -> String {
    formed(metadata, "", "")
}

/// Puts the namespace into an element that libvirt gave out without it, whatever it holds.
///
/// # Errors
/// A sentence where that cannot be done.
pub(super) fn dress(bare: &str) -> Result<String, String> {
    let document = document(bare)?;
    let root = document.root_element();
    let name = root.tag_name();
    let begin = format!("<{}", name.name());
    let rest = bare
        .get(root.range())
        .and_then(|element| element.strip_prefix(&begin));
    match rest {
        Some(rest) if name.namespace().is_none() && root.default_namespace().is_none() => {
            Ok(format!("{begin} xmlns=\"{NAMESPACE}\"{rest}"))
        }
        _ => Err(trouble(
            "its outermost element stands in another XML namespace",
        )),
    }
}

/// Reads the element, with or without its namespace.
///
/// # Errors
/// A sentence that says what is wrong with it and how to get rid of it.
pub(super) fn read(element: &str) -> Result<Metadata, String> {
    let document = document(element)?;
    let root = document.root_element();
    if !is(root, "domain") {
        return Err(trouble(&format!(
            "it is <{}>, not <domain>",
            shown(root.tag_name().name())
        )));
    }
    no_attributes(root)?;
    let mut metadata = Metadata::default();
    for child in root.children() {
        if child.is_text() && child.text().is_some_and(is_blank) {
            continue;
        }
        if is(child, "owner") {
            no_attributes(child)?;
            let text = text(child)?;
            if text.trim() != text {
                return Err(trouble("an owner has white space around it"));
            }
            let owner = text.parse().map_err(|error| bad_name("an owner", &error))?;
            if !metadata.owners.insert(owner) {
                return Err(twice("owner", &text));
            }
        } else if is(child, "class") {
            no_attributes(child)?;
            let class = text(child)?
                .parse()
                .map_err(|error| bad_name("the class", &error))?;
            if metadata.class.replace(class).is_some() {
                return Err(trouble("it holds two classes"));
            }
        } else if is(child, "label") {
            let name = only_name(child)?;
            let tag = name.parse().map_err(|error| bad_name("a label", &error))?;
            let value = text(child)?
                .parse()
                .map_err(|error| bad_name("a label", &error))?;
            if metadata.labels.insert(tag, value).is_some() {
                return Err(twice("label", name));
            }
        } else if child.is_element() {
            return Err(trouble(&format!(
                "<{}> has no meaning in it",
                shown(child.tag_name().name())
            )));
        } else {
            return Err(trouble("it holds more than elements"));
        }
    }
    match metadata.size() {
        0..=MAX_METADATA => Ok(metadata),
        size => Err(trouble(&format!(
            "it holds {size} bytes of text, and {MAX_METADATA} are allowed"
        ))),
    }
}

/// Returns what becomes of metadata: who is added and there already, or removed and not there, is no error.
pub(super) fn change(present: &Metadata, change: &Change) -> Metadata {
    let mut metadata = present.clone();
    match change {
        Change::Owners { add, remove } => {
            metadata.owners.extend(add.iter().cloned());
            metadata.owners.retain(|owner| !remove.contains(owner));
        }
        Change::Labels { set, remove } => {
            metadata.labels.extend(
                set.iter()
                    .map(|(name, value)| (name.clone(), value.clone())),
            );
            metadata.labels.retain(|name, _| !remove.contains(name));
        }
        Change::Class(class) => metadata.class.clone_from(class),
    }
    metadata
}

/// Refuses metadata that could not be read again, and a lease of nobody.
///
/// # Errors
/// `TooLarge`, or `BadRequest` for a name with a character that XML does not have, or a lease's user that is no full principal.
pub(super) fn fit(metadata: &Metadata) -> Result<(), Fault> {
    let size = metadata.size();
    if size > MAX_METADATA {
        return Err(Fault::new(
            Code::TooLarge,
            format!(
                "a domain's owners, class and labels would come to {size} bytes, and {MAX_METADATA} are allowed; remove some first"
            ),
        ));
    }
    let holds_lease = metadata
        .labels
        .keys()
        .any(|name| name.as_str() == LEASE_USER);
    if holds_lease && lease(metadata).is_none() {
        return Err(Fault::new(
            Code::BadRequest,
            format!(
                "the label {LEASE_USER} names no full principal, as alice@EXAMPLE.ORG is, so nobody would have the lease"
            ),
        ));
    }
    if read(&write(metadata)).as_ref() == Ok(metadata) {
        return Ok(());
    }
    Err(Fault::new(
        Code::BadRequest,
        "an owner or label holds a character that a domain's XML cannot keep, or an owner white space at an end",
    ))
}

/// The job that holds a domain. Until batch systems keep leases of their own, two labels stand for one: `lease-user` with the full
/// principal whose job it is (where it is none there is no lease), and `lease-job` with the job's name, which may be missing.
pub(super) fn lease(metadata: &Metadata) -> Option<Lease> {
    let label = |wanted: &str| {
        let mut labels = metadata.labels.iter();
        labels
            .find(|(name, _)| name.as_str() == wanted)
            .map(|(_, value)| value.as_str())
    };
    Some(Lease {
        user: label(LEASE_USER)?.parse().ok()?,
        job: label(LEASE_JOB).unwrap_or_default().to_owned(),
    })
}

fn formed(metadata: &Metadata, prefix: &str, declaration: &str) -> String {
    let mut element = format!("<{prefix}domain{declaration}>");
    let mut add = |tag: &str, attribute: &str, text: &str| {
        element.push_str(&format!(
            "<{prefix}{tag}{attribute}>{}</{prefix}{tag}>",
            escaped(text)
        ));
    };
    for owner in &metadata.owners {
        add("owner", "", owner.as_str());
    }
    if let Some(class) = &metadata.class {
        add("class", "", class.as_str());
    }
    for (name, value) in &metadata.labels {
        // A tag holds nothing that would have to be escaped.
        add("label", &format!(" name=\"{name}\""), value.as_str());
    }
    element.push_str(&format!("</{prefix}domain>"));
    element
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn document(element: &str) -> Result<Document<'_>, String> {
    if element.len() > MAX_ELEMENT {
        return Err(trouble(&format!(
            "it has {} bytes, and at most {MAX_ELEMENT} are read",
            element.len()
        )));
    }
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: MAX_NODES,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(element, options).map_err(|error| {
        trouble(&if matches!(error, Error::DtdDetected) {
            "it holds a DOCTYPE".to_owned()
        } else if matches!(error, Error::NodesLimitReached) {
            format!("it holds more than {MAX_NODES} elements and texts")
        } else {
            shown(&error.to_string())
        })
    })
}

fn is(node: Node<'_, '_>, tag: &str) -> bool {
    let name = node.tag_name();
    node.is_element() && name.name() == tag && matches!(name.namespace(), None | Some(NAMESPACE))
}

fn is_blank(text: &str) -> bool {
    text.bytes()
        .all(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r'))
}

fn no_attributes(node: Node<'_, '_>) -> Result<(), String> {
    match node.attributes().next() {
        None => Ok(()),
        Some(attribute) => Err(unknown_attribute(node, attribute.name())),
    }
}

fn only_name<'a>(node: Node<'a, '_>) -> Result<&'a str, String> {
    let mut name = None;
    for attribute in node.attributes() {
        if attribute.name() != "name" || attribute.namespace().is_some() {
            return Err(unknown_attribute(node, attribute.name()));
        }
        name = Some(attribute.value());
    }
    name.ok_or_else(|| trouble("a label has no name"))
}

fn unknown_attribute(node: Node<'_, '_>, name: &str) -> String {
    trouble(&format!(
        "the attribute '{}' has no meaning in <{}>",
        shown(name),
        node.tag_name().name()
    ))
}

fn text(node: Node<'_, '_>) -> Result<String, String> {
    if node.children().any(|child| !child.is_text()) {
        return Err(trouble(&format!(
            "<{}> holds more than text",
            node.tag_name().name()
        )));
    }
    Ok(node.children().filter_map(|child| child.text()).collect())
}

fn twice(what: &str, which: &str) -> String {
    trouble(&format!("it holds the {what} '{}' twice", shown(which)))
}

fn bad_name(what: &str, error: &BadName) -> String {
    trouble(&format!("{what} is none: {}", shown(&error.to_string())))
}

fn trouble(what: &str) -> String {
    format!(
        "its <metadata> for xman cannot be read: {what}; `virsh metadata DOMAIN {NAMESPACE} --remove` on its host takes it away, \
         then `rxm owner` says anew whose it is"
    )
}

/// What others wrote, made fit for a line of a log or terminal.
fn shown(text: &str) -> String {
    let fit = |c: char| if matches!(c, ' '..='~') { c } else { '?' };
    let mut line: String = text.chars().take(MAX_SHOWN).map(fit).collect();
    if text.chars().nth(MAX_SHOWN).is_some() {
        line.push_str("...");
    }
    line
}

#[cfg(test)]
mod tests {
    use proptest::{collection, option, prelude::*};
    use xman_common::name::{LabelValue, Principal, Tag};

    use super::*;

    fn metadata() -> impl Strategy<Value = Metadata> {
        let owner = "[a-zü<>&\"'/]{1,20}@[A-Z.\\]>]{1,10}"
            .prop_map(|text| text.parse::<Principal>().unwrap());
        let tag = || "[a-z0-9][a-z0-9._-]{0,20}".prop_map(|text| text.parse::<Tag>().unwrap());
        let value = "[ -~ü\u{10ffff}]{1,30}".prop_map(|text| text.parse::<LabelValue>().unwrap());
        (
            collection::btree_set(owner, 0..8),
            option::of(tag()),
            collection::btree_map(tag(), value, 0..8),
        )
            .prop_map(|(owners, class, labels)| Metadata {
                owners,
                class,
                labels,
            })
    }

    proptest! {
        #[test]
        fn what_was_written_is_read_in_either_form(metadata in metadata()) {
            let bare = write_bare(&metadata);
            for form in [write(&metadata), dress(&bare).unwrap(), bare] {
                prop_assert_eq!(read(&form), Ok(metadata.clone()), "{}", form);
            }
            prop_assert!(fit(&metadata).is_ok());
        }

        #[test]
        fn nothing_makes_the_reader_panic_or_its_message_long(text in "(<|</|/>|>|xman:|domain|owner|label| name='|'| xmlns|=|a@B|&#1;|]]>|<!--|\\PC){0,60}") {
            if let Err(why) = read(&text) {
                prop_assert!(why.len() < 800 && why.contains("--remove") && !why.contains(char::is_control), "{}", why);
            }
            let _ = dress(&text);
        }

        #[test]
        fn what_is_added_or_removed_twice_is_so_once(metadata in metadata(), other in self::metadata()) {
            for asked in [
                Change::Owners { add: other.owners.clone(), remove: metadata.owners.iter().take(2).cloned().collect() },
                Change::Labels { set: other.labels.clone(), remove: metadata.labels.keys().take(2).cloned().collect() },
                Change::Class(other.class.clone()),
            ] {
                let once = change(&metadata, &asked);
                prop_assert_eq!(&change(&once, &asked), &once);
            }
        }
    }

    #[track_caller]
    fn refused(element: &str, why: &str) {
        let trouble = read(element).unwrap_err();
        assert!(trouble.contains(why), "{trouble}");
        assert!(
            trouble.contains("virsh metadata DOMAIN urn:xman:domain:1 --remove")
                && trouble.contains("rxm owner")
        );
    }

    #[test]
    fn the_form_is_the_documented_one() {
        let element = "<xman:domain xmlns:xman=\"urn:xman:domain:1\"><xman:owner>alice@EXAMPLE.ORG</xman:owner>\
             <xman:class>grid</xman:class><xman:label name=\"tier\">prod &amp; test</xman:label></xman:domain>";
        let metadata = read(element).unwrap();
        assert_eq!(
            metadata.owners.first().unwrap().as_str(),
            "alice@EXAMPLE.ORG"
        );
        assert_eq!(metadata.class.as_ref().unwrap().as_str(), "grid");
        assert_eq!(
            metadata.labels.values().next().unwrap().as_str(),
            "prod & test"
        );
        assert_eq!(write(&metadata), element);
        let by_hand = "<domain>\n  <owner>alice@EXAMPLE.ORG</owner>\n  <label name='tier'>prod &#38; test</label>\n  <class>grid</class>\n</domain>\n";
        assert_eq!(read(by_hand), Ok(metadata));
        assert_eq!(read("<domain/>"), Ok(Metadata::default()));
    }

    #[test]
    fn what_is_not_understood_is_refused_and_never_left_out() {
        refused("", "cannot be read");
        refused("<owner>a@B</owner>", "not <domain>");
        refused("<domain xmlns='urn:xman:domain:2'/>", "not <domain>");
        refused("<domain version='2'/>", "the attribute 'version'");
        refused(
            "<domain><group>x</group></domain>",
            "<group> has no meaning",
        );
        refused(
            "<domain><x:owner xmlns:x='y'>a@B</x:owner></domain>",
            "<owner> has no meaning",
        );
        refused("<domain>alice@B</domain>", "more than elements");
        refused("<domain><!-- alice@B --></domain>", "more than elements");
        refused("<domain><?a b?></domain>", "more than elements");
        refused("<domain><owner>alice</owner></domain>", "names no realm");
        refused("<domain><owner> alice@B</owner></domain>", "white space");
        refused("<domain><owner>alice@B\n</owner></domain>", "white space");
        refused(
            "<domain><owner>al<!-- -->ice@B</owner></domain>",
            "more than text",
        );
        refused(
            "<domain><owner kind='group'>alice@B</owner></domain>",
            "the attribute 'kind'",
        );
        refused(
            "<domain><owner>a@B</owner><owner>a@B</owner></domain>",
            "twice",
        );
        refused(
            "<domain><class>a</class><class>b</class></domain>",
            "two classes",
        );
        refused("<domain><class>A b</class></domain>", "the class is none");
        refused("<domain><class/></domain>", "empty");
        refused("<domain><label>x</label></domain>", "no name");
        refused(
            "<domain><label name='a' x:name='b' xmlns:x='y'>x</label></domain>",
            "the attribute 'name'",
        );
        refused(
            "<domain><label name='a'>x</label><label name='a'>y</label></domain>",
            "twice",
        );
        refused("<domain><label name='a'/></domain>", "empty");
        refused(
            "<!DOCTYPE d [<!ENTITY a 'b@C'>]><domain><owner>&a;</owner></domain>",
            "DOCTYPE",
        );
    }

    #[test]
    fn size_and_number_are_bounded() {
        let owners = |count: usize| -> String {
            (0..count)
                .map(|n| format!("<owner>{n:04}@EX</owner>"))
                .collect()
        };
        assert!(read(&format!("<domain>{}</domain>", owners(500))).is_ok());
        refused(
            &format!("<domain>{}</domain>", owners(700)),
            "4096 are allowed",
        );
        refused(
            &format!("<domain>{}</domain>", "<owner/>".repeat(10_000)),
            "more than 8192",
        );
        refused(
            &format!("<domain>{}</domain>", " ".repeat(MAX_ELEMENT)),
            "at most",
        );
        let most = Metadata {
            labels: (0..1024)
                .map(|n| (format!("{n:03x}").parse().unwrap(), "&".parse().unwrap()))
                .collect(),
            ..Metadata::default()
        };
        assert_eq!(most.size(), MAX_METADATA);
        fit(&most).unwrap();
        let over = change(&most, &Change::Class(Some("x".parse().unwrap())));
        assert_eq!(fit(&over).unwrap_err().code, Code::TooLarge);
        let unwritable = Metadata {
            owners: ["a\u{fffe}@EX".parse().unwrap()].into(),
            ..Metadata::default()
        };
        assert_eq!(fit(&unwritable).unwrap_err().code, Code::BadRequest);
    }

    #[test]
    fn two_labels_stand_for_a_lease() {
        let labelled = |labels: &[(&str, &str)]| Metadata {
            labels: labels
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                .collect(),
            ..Metadata::default()
        };
        let held = lease(&labelled(&[
            ("lease-user", "alice@EX.ORG"),
            ("lease-job", "slurm/4711"),
        ]))
        .unwrap();
        assert_eq!(
            (held.user.as_str(), held.job.as_str()),
            ("alice@EX.ORG", "slurm/4711")
        );
        assert_eq!(
            lease(&labelled(&[("lease-user", "alice@EX.ORG")]))
                .unwrap()
                .job,
            ""
        );
        let nobodys = labelled(&[("lease-user", "alice")]);
        assert_eq!(lease(&nobodys), None);
        let fault = fit(&nobodys).unwrap_err();
        assert!(fault.code == Code::BadRequest && fault.message.contains("lease-user"));
        assert_eq!(lease(&labelled(&[("lease-job", "slurm/4711")])), None);
    }

    #[test]
    fn a_broken_element_gets_its_namespace_back_as_it_is() {
        let dressed = dress("<domain>\n  <group>x</group>\n</domain>").unwrap();
        let document = Document::parse(&dressed).unwrap();
        assert!(
            document
                .descendants()
                .filter(Node::is_element)
                .all(|node| node.tag_name().namespace() == Some(NAMESPACE))
        );
        assert_eq!(
            read(&dressed),
            read("<domain>\n  <group>x</group>\n</domain>")
        );
        assert!(dress("<domain xmlns='x'/>").is_err() && dress("nothing").is_err());
    }
}
