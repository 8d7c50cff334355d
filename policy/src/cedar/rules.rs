//! The text of policies made into rules: parsed, held against the schema, and sorted by what they can ever be asked about.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    str::FromStr,
    thread,
};

use cedar_policy::{
    ActionConstraint, Effect, EntityTypeName, EntityUid, Expression, Policy, PolicyId, PolicySet,
    PrincipalConstraint, ResourceConstraint, Schema, ValidationMode, Validator,
    pst::{self, Clause},
};
use miette::Diagnostic;
use uuid::Uuid;
use xman_common::name::Principal;

use super::{
    folder::{GROUPS, Text},
    scene::{Kind, Names, Used},
};
use crate::{
    Action,
    groups::{Defect, Groups, UNIX},
};

/// What policies can speak of.
pub const SCHEMA: &str = include_str!("../../schema.cedarschema");
/// The schema's version; its first line says the same.
pub const SCHEMA_VERSION: u32 = 1;
/// The most policies: each costs every request a little, and reading them holds up who asks first.
pub const MAX_POLICIES: usize = 2000;
/// The longest policy, in bytes, and how deep its brackets may nest: Cedar's parser and validator go down with what nests, and end the process where the
/// stack ends.
pub const MAX_POLICY: usize = 8 * 1024;
/// See [`MAX_POLICY`].
pub const MAX_NESTING: usize = 32;
/// The stack on which policies are read. Only what is used of it is ever taken.
const STACK: usize = 256 * 1024 * 1024;
/// The longest `@id`, in bytes: it is a part of the rule that the audit shows.
pub const MAX_ID: usize = 64;
/// The most defects that are told at once, and the most warnings.
pub const MAX_TOLD: usize = 100;
/// The longest piece of a policy that is shown, in characters.
pub(crate) const MAX_SHOWN: usize = 300;

/// One policy.
#[derive(Debug)]
pub(crate) struct Rule {
    /// `FILE:ID`, or `FILE:LINE` where it has no `@id`.
    pub(crate) name: String,
    pub(crate) forbids: bool,
    principal: PrincipalConstraint,
    resource: ResourceConstraint,
    pub(crate) policy: Policy,
    /// Its conditions one by one, for people.
    pub(crate) parts: Vec<Part>,
}

/// One thing that must be true for a policy to apply.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) text: String,
    /// None where the text cannot be evaluated by itself.
    pub(crate) test: Option<Expression>,
}

impl Part {
    fn new(text: String) -> Self {
        Self {
            test: text.parse().ok(),
            text,
        }
    }
}

impl Rule {
    /// Returns whether the policy's head admits this principal.
    pub(crate) fn admits(&self, principal: &EntityUid, groups: &HashSet<EntityUid>) -> bool {
        match &self.principal {
            PrincipalConstraint::Any => true,
            PrincipalConstraint::Eq(uid) => uid == principal,
            PrincipalConstraint::In(uid) => uid == principal || groups.contains(uid),
            PrincipalConstraint::Is(kind) => kind == principal.type_name(),
            PrincipalConstraint::IsIn(kind, uid) => {
                kind == principal.type_name() && (uid == principal || groups.contains(uid))
            }
        }
    }

    /// Returns whether the policy's head reaches this resource.
    pub(crate) fn reaches(&self, resource: &EntityUid, groups: &HashSet<EntityUid>) -> bool {
        match &self.resource {
            ResourceConstraint::Any => true,
            ResourceConstraint::Eq(uid) => uid == resource,
            ResourceConstraint::In(uid) => uid == resource || groups.contains(uid),
            ResourceConstraint::Is(kind) => kind == resource.type_name(),
            ResourceConstraint::IsIn(kind, uid) => {
                kind == resource.type_name() && (uid == resource || groups.contains(uid))
            }
        }
    }

    /// Returns what the policy's head wants of the principal, as it is written there.
    pub(crate) fn wanted_principal(&self) -> String {
        match &self.principal {
            PrincipalConstraint::Any => "principal".to_owned(),
            PrincipalConstraint::Eq(uid) => format!("principal == {uid}"),
            PrincipalConstraint::In(uid) => format!("principal in {uid}"),
            PrincipalConstraint::Is(kind) => format!("principal is {kind}"),
            PrincipalConstraint::IsIn(kind, uid) => format!("principal is {kind} in {uid}"),
        }
    }

    /// Returns what the policy's head wants of the resource.
    pub(crate) fn wanted_resource(&self) -> String {
        match &self.resource {
            ResourceConstraint::Any => "resource".to_owned(),
            ResourceConstraint::Eq(uid) => format!("resource == {uid}"),
            ResourceConstraint::In(uid) => format!("resource in {uid}"),
            ResourceConstraint::Is(kind) => format!("resource is {kind}"),
            ResourceConstraint::IsIn(kind, uid) => format!("resource is {kind} in {uid}"),
        }
    }

    fn can_reach(&self, kind: &EntityTypeName) -> bool {
        match &self.resource {
            ResourceConstraint::Any => true,
            // what is in a group may be of another type than the group
            ResourceConstraint::In(_) => true,
            ResourceConstraint::Eq(uid) => uid.type_name() == kind,
            ResourceConstraint::Is(of) | ResourceConstraint::IsIn(of, _) => of == kind,
        }
    }
}

/// All that a site says: policies and groups, of one version of its folder.
#[derive(Debug)]
pub(crate) struct Rules {
    rules: Vec<Rule>,
    /// Which rules' heads can match, by what is done to what; nothing for what no policy is ever asked about.
    by_question: HashMap<(Action, Kind), Vec<usize>>,
    pub(crate) groups: Groups,
    pub(crate) names: Names,
    /// Whether a policy goes by Unix groups.
    pub(crate) by_unix_groups: bool,
    pub(crate) files: usize,
    pub(crate) warnings: Vec<String>,
    /// The same once more as Cedar has it, for tests to compare with.
    #[cfg(test)]
    pub(crate) whole: PolicySet,
}

impl Rules {
    /// Makes rules of the files' texts.
    ///
    /// # Errors
    /// All that is wrong, each with its place.
    pub(crate) fn new(texts: &[Text], host: &str) -> Result<Self, Vec<String>> {
        thread::scope(|scope| {
            let reader = thread::Builder::new()
                .name("policies".to_owned())
                .stack_size(STACK)
                .spawn_scoped(scope, || Self::read(texts, host))
                .map_err(|error| vec![format!("no thread to read the policies on: {error}")])?;
            reader.join().unwrap_or_else(|_| {
                Err(vec![
                    "reading failed; what xmand wrote to stderr says where".to_owned(),
                ])
            })
        })
    }

    fn read(texts: &[Text], host: &str) -> Result<Self, Vec<String>> {
        let schema = Schema::from_str(SCHEMA)
            .map_err(|error| vec![format!("xmand's own schema is broken: {error}")])?;
        let mut reading = Reading::default();
        reading.groups(texts);
        for (file, text) in texts {
            if file != GROUPS {
                reading.file(file, text);
            }
        }
        if reading.found.len() > MAX_POLICIES {
            reading.wrong(
                "",
                0,
                0,
                format!("at most {MAX_POLICIES} policies are read"),
            );
        } else {
            reading.validate(schema.clone());
        }
        reading.finish(&schema, host)
    }

    /// Returns the rules whose heads can match the action on a resource of this kind, in the order of files and lines; nothing where the schema does
    /// not put them together.
    pub(crate) fn about(&self, action: Action, kind: Kind) -> Option<impl Iterator<Item = &Rule>> {
        let places = self.by_question.get(&(action, kind))?;
        Some(places.iter().filter_map(|place| self.rules.get(*place)))
    }

    pub(crate) fn len(&self) -> usize {
        self.rules.len()
    }
}

/// A policy and where it stands.
struct Found<'a> {
    policy: Policy,
    file: &'a str,
    text: &'a str,
    line: usize,
}

#[derive(Default)]
struct Reading<'a> {
    found: Vec<Found<'a>>,
    ids: BTreeMap<String, String>,
    groups: Groups,
    files: usize,
    defects: Vec<(String, usize, usize, String)>,
    warnings: Vec<String>,
    #[cfg(test)]
    whole: PolicySet,
}

impl<'a> Reading<'a> {
    fn wrong(&mut self, file: &str, line: usize, column: usize, what: impl AsRef<str>) {
        self.defects
            .push((file.to_owned(), line, column, one_line(what.as_ref())));
    }

    fn wrong_at(&mut self, file: &str, text: &str, at: usize, what: impl Into<String>) {
        let Defect { line, column, what } = Defect::new(text, at, what.into());
        self.wrong(file, line, column, what);
    }

    fn groups(&mut self, texts: &[Text]) {
        let Some((file, text)) = texts.iter().find(|(file, _)| file == GROUPS) else {
            return;
        };
        match Groups::parse(text) {
            Ok(groups) => {
                let warnings = groups.warnings().iter();
                self.warnings
                    .extend(warnings.map(|warning| format!("{file}: {warning}")));
                self.groups = groups;
            }
            Err(defects) => {
                for Defect { line, column, what } in defects {
                    self.wrong(file, line, column, what);
                }
            }
        }
    }

    fn file(&mut self, file: &'a str, text: &'a str) {
        self.files += 1;
        if let Some((at, what)) = too_much(text) {
            self.wrong_at(file, text, at, what);
            return;
        }
        let policies = match PolicySet::from_str(text) {
            Ok(policies) => policies,
            Err(errors) => {
                for error in errors.iter() {
                    self.wrong_at(file, text, begin(error), described(error));
                }
                return;
            }
        };
        for template in policies.templates() {
            let at = text.find(&template.to_string()).unwrap_or(0);
            self.wrong_at(
                file,
                text,
                at,
                "a template, with ?principal or ?resource, which nothing here fills in; write one policy for each",
            );
        }
        let mut in_order: Vec<&Policy> = policies.policies().collect();
        in_order.sort_by_key(|policy| number(policy.id()));
        if in_order.is_empty() && policies.num_of_templates() == 0 {
            self.wrong(file, 1, 1, "holds no policy; write one, or remove the file");
        }
        let mut from = 0;
        for policy in in_order {
            let source = policy.to_string();
            let at = text
                .get(from..)
                .and_then(|rest| rest.find(&source))
                .map_or(from, |at| from + at);
            from = at + source.len();
            let Defect { line, column, .. } = Defect::new(text, at, String::new());
            let name = self.name(policy, file, line, column);
            self.found.push(Found {
                policy: policy.new_id(PolicyId::new(name)),
                file,
                text,
                line,
            });
        }
    }

    fn name(&mut self, policy: &Policy, file: &str, line: usize, column: usize) -> String {
        let by_line = if self
            .found
            .iter()
            .any(|found| found.file == file && found.line == line)
        {
            format!("{file}:{line}.{column}")
        } else {
            format!("{file}:{line}")
        };
        let Some(id) = policy.annotation("id") else {
            return by_line;
        };
        if id.is_empty() || id.len() > MAX_ID || !id.chars().all(is_plain) {
            self.wrong(
                file,
                line,
                column,
                format!(
                    "@id(\"{}\") stands in the audit, so it is made of at most {MAX_ID} letters, digits, '.', '-' and '_'",
                    shown(id)
                ),
            );
            return by_line;
        }
        if id.starts_with(|c: char| c.is_ascii_digit()) {
            self.wrong(
                file,
                line,
                column,
                format!("@id(\"{id}\") looks like a line's number; begin with a letter"),
            );
            return by_line;
        }
        let place = format!("{file}:{line}");
        if let Some(other) = self.ids.insert(id.to_owned(), place) {
            self.wrong(
                file,
                line,
                column,
                format!("@id(\"{id}\") stands at {other} as well; call one otherwise"),
            );
            return by_line;
        }
        format!("{file}:{id}")
    }

    fn validate(&mut self, schema: Schema) {
        let mut all = PolicySet::new();
        for found in &self.found {
            if let Err(error) = all.add(found.policy.clone()) {
                self.defects
                    .push((found.file.to_owned(), found.line, 1, error.to_string()));
            }
        }
        let result = Validator::new(schema).validate(&all, ValidationMode::Strict);
        let place = |id: &PolicyId, diagnostic: &dyn Diagnostic| {
            let found = self.found.iter().find(|found| found.policy.id() == id);
            let (file, text) = found.map_or(("", ""), |found| (found.file, found.text));
            let Defect { line, column, .. } = Defect::new(text, begin(diagnostic), String::new());
            (file.to_owned(), line, column)
        };
        let defects = result.validation_errors().map(|error| {
            let (file, line, column) = place(error.policy_id(), error);
            (file, line, column, one_line(&described(error)))
        });
        let warnings = result.validation_warnings().map(|warning| {
            let (file, line, column) = place(warning.policy_id(), warning);
            format!("{file}:{line}:{column}: {}", one_line(&described(warning)))
        });
        let (defects, warnings): (Vec<_>, Vec<_>) = (defects.collect(), warnings.collect());
        self.defects.extend(defects);
        self.warnings.extend(warnings);
        #[cfg(test)]
        {
            self.whole = all;
        }
    }

    fn finish(mut self, schema: &Schema, host: &str) -> Result<Rules, Vec<String>> {
        let mut rules = Vec::new();
        let mut heads = Vec::new();
        let mut by_unix_groups = false;
        let mut used = Used::default();
        for found in std::mem::take(&mut self.found) {
            for uid in found.policy.entity_literals() {
                by_unix_groups |= self.literal(&found, &uid);
            }
            match rule(&found.policy) {
                Ok((rule, says)) => {
                    used.add(says.used);
                    if says.foreign_unix_groups {
                        self.wrong(
                            found.file,
                            found.line,
                            1,
                            format!(
                                "asks for a Unix group ({UNIX}...) of somebody else than principal or resource, of whom none is known; use a group of {GROUPS}"
                            ),
                        );
                    }
                    self.broad(&found, &rule);
                    heads.push(found.policy.action_constraint());
                    rules.push(rule);
                }
                Err(what) => self.wrong(found.file, found.line, 1, what),
            }
        }
        if !self.defects.is_empty() {
            return Err(self.told());
        }
        let names = Names::new(schema, host, used)?;
        let actions = schema
            .action_entities()
            .map_err(|error| vec![format!("xmand's own schema is broken: {error}")])?;
        let by_question = names
            .questions(schema)
            .map(|(action, kind)| {
                let uid = names.action(action);
                let above: HashSet<&EntityUid> =
                    actions.ancestors(&uid).into_iter().flatten().collect();
                let includes = |head: &ActionConstraint| match head {
                    ActionConstraint::Any => true,
                    ActionConstraint::Eq(wanted) => *wanted == uid,
                    ActionConstraint::In(wanted) => wanted
                        .iter()
                        .any(|wanted| *wanted == uid || above.contains(wanted)),
                };
                let of_kind = names.kind(kind);
                let places = rules
                    .iter()
                    .zip(&heads)
                    .enumerate()
                    .filter(|(_, (rule, head))| includes(head) && rule.can_reach(of_kind))
                    .map(|(place, _)| place);
                ((action, kind), places.collect())
            })
            .collect();
        let unkept = self.warnings.len().saturating_sub(MAX_TOLD);
        self.warnings.truncate(MAX_TOLD);
        if unkept > 0 {
            self.warnings.push(format!("and {unkept} more"));
        }
        Ok(Rules {
            rules,
            by_question,
            groups: self.groups,
            names,
            by_unix_groups,
            files: self.files,
            warnings: self.warnings,
            #[cfg(test)]
            whole: self.whole,
        })
    }

    /// Refuses names that never stand for anybody or anything: a forbid of them, or an exception, would silently never apply. Returns whether it
    /// is a Unix group's.
    fn literal(&mut self, found: &Found<'_>, uid: &EntityUid) -> bool {
        let id: &str = uid.id().as_ref();
        let kind = uid.type_name().basename();
        let never = match kind {
            "Group" if id.starts_with(UNIX) => return true,
            "Group" if !self.groups.contains(id) => format!("is not defined in {GROUPS}"),
            "User" if id.parse::<Principal>().is_err() => {
                "is no full principal, as alice@EXAMPLE.ORG is".to_owned()
            }
            "Domain"
                if Uuid::try_parse(id).map_or(true, |uuid| uuid.hyphenated().to_string() != id) =>
            {
                "is no UUID in small letters with hyphens; for a name compare resource.name"
                    .to_owned()
            }
            _ => return false,
        };
        let what = format!("{kind}::\"{}\" {never}: it never matches", shown(id));
        self.wrong(found.file, found.line, 1, what);
        false
    }

    /// Warns about a permit of what one asks a host for that reaches all domains.
    fn broad(&mut self, found: &Found<'_>, rule: &Rule) {
        let groups = match found.policy.action_constraint() {
            ActionConstraint::In(groups) => groups,
            ActionConstraint::Any | ActionConstraint::Eq(_) => return,
        };
        let named = |name: &str| {
            groups
                .iter()
                .find(|uid| AsRef::<str>::as_ref(uid.id()) == name)
        };
        // who means all that can be seen says so
        let about_hosts = match named("view") {
            Some(_) => None,
            None => named("ask").or_else(|| named("host")),
        };
        if let (Some(group), false, ResourceConstraint::Any, true) = (
            about_hosts,
            rule.forbids,
            &rule.resource,
            rule.parts.is_empty(),
        ) {
            self.warnings.push(format!(
                "{}: {group} is about the host, and this reaches each domain as well; write `resource is Host`",
                rule.name
            ));
        }
    }

    fn told(mut self) -> Vec<String> {
        self.defects.sort();
        // the same thing is wrong for one action after the other
        self.defects
            .dedup_by(|a, b| a.2 > 0 && (&a.0, a.1, a.2) == (&b.0, b.1, b.2));
        let unkept = self.defects.len().saturating_sub(MAX_TOLD);
        let mut told: Vec<String> = self
            .defects
            .into_iter()
            .take(MAX_TOLD)
            .map(|(file, line, column, what)| match file.as_str() {
                "" => what,
                _ => format!("{file}:{line}:{column}: {what}"),
            })
            .collect();
        if unkept > 0 {
            told.push(format!("and {unkept} more"));
        }
        told
    }
}

/// What the conditions of a policy speak of.
#[derive(Default)]
struct Says {
    used: Used,
    foreign_unix_groups: bool,
}

fn rule(policy: &Policy) -> Result<(Rule, Says), String> {
    let whole = policy.to_pst().map_err(|error| error.to_string())?;
    let mut says = Says::default();
    let mut parts = Vec::new();
    for clause in whole.body().clauses() {
        match clause {
            Clause::When(expression) => {
                says.look(expression);
                for conjunct in conjuncts(expression) {
                    parts.push(Part::new(conjunct.to_string()));
                }
            }
            Clause::Unless(expression) => {
                says.look(expression);
                parts.push(Part::new(format!("!({expression})")));
            }
        }
    }
    let rule = Rule {
        name: policy.id().to_string(),
        forbids: policy.effect() == Effect::Forbid,
        principal: policy.principal_constraint(),
        resource: policy.resource_constraint(),
        policy: settled(policy, whole.body().clone())?,
        parts,
    };
    Ok((rule, says))
}

/// Returns the policy without what its place in [`Rules::about`] has settled: which action, and a resource of which type.
fn settled(policy: &Policy, mut body: pst::Template) -> Result<Policy, String> {
    body.action = pst::ActionConstraint::Any;
    if let pst::ResourceConstraint::Is(_) = body.resource {
        body.resource = pst::ResourceConstraint::Any;
    }
    let body = pst::StaticPolicy::try_from(body).map_err(|error| error.to_string())?;
    let settled = Policy::from_pst(body.into()).map_err(|error| error.to_string())?;
    Ok(settled.new_id(policy.id().clone()))
}

/// What `&&` holds together, from left to right.
fn conjuncts(expression: &pst::Expr) -> Vec<&pst::Expr> {
    let mut found = Vec::new();
    let mut open = vec![expression];
    while let Some(next) = open.pop() {
        if let pst::Expr::BinaryOp {
            op: pst::BinaryOp::And,
            left,
            right,
        } = next
        {
            open.extend([right.as_ref(), left.as_ref()]);
        } else {
            found.push(next);
        }
    }
    found
}

impl Says {
    fn look(&mut self, expression: &pst::Expr) {
        // bounded by the parser, which refuses what nests too deep
        let mut open = vec![expression];
        while let Some(next) = open.pop() {
            if let pst::Expr::GetAttr { attr, .. } = next {
                self.used.attributes.insert(attr.to_string());
            } else if let pst::Expr::HasAttr { attrs, .. } = next {
                let names = attrs.iter().map(ToString::to_string);
                self.used.attributes.extend(names);
            } else if let pst::Expr::BinaryOp {
                op: pst::BinaryOp::HasTag | pst::BinaryOp::GetTag,
                ..
            } = next
            {
                self.used.tags = true;
            } else if let pst::Expr::Var(pst::Var::Action) = next {
                self.used.actions = true;
            } else if let pst::Expr::Literal(pst::Literal::EntityUID(uid)) = next {
                self.used.actions |= uid.ty.to_string() == "Action";
            } else if let pst::Expr::BinaryOp {
                op: pst::BinaryOp::In,
                left,
                right,
            }
            | pst::Expr::Is {
                expr: left,
                in_expr: Some(right),
                ..
            } = next
            {
                self.foreign_unix_groups |= !is_known(left) && names_unix_group(right);
            }
            open.extend(children(next));
        }
    }
}

fn is_known(expression: &pst::Expr) -> bool {
    matches!(
        expression,
        pst::Expr::Var(pst::Var::Principal | pst::Var::Resource)
    )
}

fn names_unix_group(expression: &pst::Expr) -> bool {
    if let pst::Expr::Literal(pst::Literal::EntityUID(uid)) = expression {
        uid.eid.starts_with(UNIX)
    } else {
        children(expression).into_iter().any(names_unix_group)
    }
}

fn children(expression: &pst::Expr) -> Vec<&pst::Expr> {
    match expression {
        pst::Expr::UnaryOp { expr, .. }
        | pst::Expr::GetAttr { expr, .. }
        | pst::Expr::HasAttr { expr, .. }
        | pst::Expr::Like { expr, .. } => vec![expr],
        pst::Expr::Is { expr, in_expr, .. } => {
            let outer = in_expr.as_deref();
            [Some(expr.as_ref()), outer].into_iter().flatten().collect()
        }
        pst::Expr::BinaryOp { left, right, .. } => vec![left, right],
        pst::Expr::IfThenElse {
            cond,
            then_expr,
            else_expr,
        } => vec![cond, then_expr, else_expr],
        pst::Expr::Set(members) => members.iter().map(AsRef::as_ref).collect(),
        pst::Expr::Record(fields) => fields.values().map(AsRef::as_ref).collect(),
        pst::Expr::Literal(_)
        | pst::Expr::Var(_)
        | pst::Expr::Slot(_)
        | pst::Expr::Unknown { .. }
        | _ => Vec::new(),
    }
}

/// Finds what is longer or deeper than Cedar is trusted with; brackets and semicolons in strings and comments do not count.
fn too_much(text: &str) -> Option<(usize, String)> {
    let (mut depth, mut began) = (0_usize, 0_usize);
    let mut bytes = text.bytes().enumerate().peekable();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'"' => {
                let mut escaped = false;
                for (_, byte) in bytes.by_ref() {
                    if byte == b'"' && !escaped {
                        break;
                    }
                    escaped = byte == b'\\' && !escaped;
                }
            }
            b'/' if matches!(bytes.peek(), Some((_, b'/'))) => {
                let mut end = at;
                for (at, byte) in bytes.by_ref() {
                    end = at;
                    if byte == b'\n' {
                        break;
                    }
                }
                began += end - at;
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            b';' => began = at + 1,
            _ => {}
        }
        if depth > MAX_NESTING {
            let what =
                format!("brackets nest deeper than {MAX_NESTING}; write it in a simpler way");
            return Some((at, what));
        }
        if at.saturating_sub(began) > MAX_POLICY {
            let what = format!("a policy of more than {MAX_POLICY} bytes; make several of it");
            return Some((began, what));
        }
    }
    None
}

fn number(id: &PolicyId) -> usize {
    let id: &str = id.as_ref();
    id.trim_start_matches("policy")
        .parse()
        .unwrap_or(usize::MAX)
}

fn begin(diagnostic: &dyn Diagnostic) -> usize {
    diagnostic
        .labels()
        .and_then(|mut labels| labels.next())
        .map_or(0, |label| label.offset())
}

fn described(diagnostic: &dyn Diagnostic) -> String {
    match diagnostic.help() {
        Some(help) => format!("{diagnostic}; {help}"),
        None => diagnostic.to_string(),
    }
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')
}

/// A site's text as it may stand in a log: one line, not too long.
pub(crate) fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let line = words.join(" ");
    let mut kept: String = line.chars().take(MAX_SHOWN).collect();
    if kept.len() < line.len() {
        kept.push_str("...");
    }
    kept.chars()
        .flat_map(|c| {
            let escape = c.is_control();
            let escaped = escape.then(|| c.escape_debug());
            escaped.into_iter().flatten().chain((!escape).then_some(c))
        })
        .collect()
}

fn shown(id: &str) -> String {
    id.chars()
        .take(MAX_ID)
        .flat_map(char::escape_debug)
        .collect()
}
