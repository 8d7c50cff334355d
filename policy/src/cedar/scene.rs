//! What a question is about, in Cedar's terms: persons, groups, domains and the host as the schema has them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use cedar_policy::{
    Context, Entities, Entity, EntityId, EntityTypeName, EntityUid, Request, RestrictedExpression,
    Schema,
};
use uuid::Uuid;
use xman_common::{
    name::Principal,
    protocol::{DomainState, Metadata},
};

use crate::{
    Action, Person, Query, Subject, UnixGroups,
    groups::{Groups, Parts, UNIX},
};

/// The state of a domain that does not exist yet; no state of libvirt's has this name.
const NEW: &str = "new";

/// What kind of thing is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Host,
    Domain,
    User,
}

impl Kind {
    pub(crate) const ALL: [Self; 3] = [Self::Host, Self::Domain, Self::User];

    pub(crate) fn of(subject: &Subject<'_>) -> Self {
        match subject {
            Subject::Host => Self::Host,
            Subject::Domain(_) | Subject::UnknownDomain | Subject::NewDomain { .. } => Self::Domain,
            Subject::Person(_) => Self::User,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Host => "Host",
            Self::Domain => "Domain",
            Self::User => "User",
        }
    }
}

/// What the conditions of all policies speak of. Nothing else is put before Cedar: most of a decision's time goes into what no policy looks at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Used {
    pub(crate) attributes: BTreeSet<String>,
    pub(crate) tags: bool,
    /// Whether they speak of actions beyond their heads.
    pub(crate) actions: bool,
}

impl Used {
    pub(crate) fn add(&mut self, other: Self) {
        self.attributes.extend(other.attributes);
        self.tags |= other.tags;
        self.actions |= other.actions;
    }

    fn has(&self, attribute: &str) -> bool {
        self.attributes.contains(attribute)
    }
}

/// The names of the schema's types and of what stands still.
#[derive(Debug)]
pub(crate) struct Names {
    user: EntityTypeName,
    group: EntityTypeName,
    domain: EntityTypeName,
    host_type: EntityTypeName,
    host: Entity,
    host_uid: EntityUid,
    used: Used,
    actions: HashMap<Action, (EntityUid, Vec<Entity>)>,
}

impl Names {
    /// Finds them.
    pub(crate) fn new(schema: &Schema, host: &str, used: Used) -> Result<Self, Vec<String>> {
        let broken = |error: String| vec![format!("xmand's own schema is broken: {error}")];
        let named = |name: &str| {
            name.parse::<EntityTypeName>()
                .map_err(|error| broken(error.to_string()))
        };
        let host_type = named(Kind::Host.name())?;
        let action_type = named("Action")?;
        let host_uid = EntityUid::from_type_name_and_id(host_type.clone(), EntityId::new(host));
        let host =
            entity(&host_uid, [("name", text(host))], [], []).map_err(|error| vec![error])?;
        let all = schema
            .action_entities()
            .map_err(|error| broken(error.to_string()))?;
        let actions = Action::all()
            .map(|action| {
                let uid = EntityUid::from_type_name_and_id(
                    action_type.clone(),
                    EntityId::new(action.name()),
                );
                // with itself come the groups that it is in
                let entities = all
                    .iter()
                    .filter(|entity| used.actions || entity.uid() == uid)
                    .cloned()
                    .collect();
                (action, (uid, entities))
            })
            .collect();
        Ok(Self {
            user: named(Kind::User.name())?,
            group: named("Group")?,
            domain: named(Kind::Domain.name())?,
            host_type,
            host,
            host_uid,
            used,
            actions,
        })
    }

    /// Returns what the schema puts together.
    pub(crate) fn questions(&self, schema: &Schema) -> impl Iterator<Item = (Action, Kind)> {
        let together: HashSet<(EntityUid, EntityTypeName)> = schema
            .request_envs()
            .map(|asked| (asked.action().clone(), asked.resource().clone()))
            .collect();
        Action::all()
            .flat_map(|action| Kind::ALL.map(|kind| (action, kind)))
            .filter(move |(action, kind)| {
                together.contains(&(self.action(*action), self.kind(*kind).clone()))
            })
    }

    pub(crate) fn action(&self, action: Action) -> EntityUid {
        match self.actions.get(&action) {
            Some((uid, _)) => uid.clone(),
            // every action is in the table, which is made of them
            None => self.host_uid.clone(),
        }
    }

    pub(crate) fn kind(&self, kind: Kind) -> &EntityTypeName {
        match kind {
            Kind::Host => &self.host_type,
            Kind::Domain => &self.domain,
            Kind::User => &self.user,
        }
    }

    fn user(&self, principal: &Principal) -> EntityUid {
        EntityUid::from_type_name_and_id(self.user.clone(), EntityId::new(principal.as_str()))
    }

    fn group(&self, name: &str) -> EntityUid {
        EntityUid::from_type_name_and_id(self.group.clone(), EntityId::new(name))
    }

    fn resource(&self, subject: &Subject<'_>) -> EntityUid {
        let domain = |uuid: Uuid| {
            let mut buffer = Uuid::encode_buffer();
            let id = EntityId::new(&*uuid.hyphenated().encode_lower(&mut buffer));
            EntityUid::from_type_name_and_id(self.domain.clone(), id)
        };
        match subject {
            Subject::Host => self.host_uid.clone(),
            Subject::Domain(facts) => domain(facts.uuid),
            Subject::UnknownDomain => domain(Uuid::nil()),
            Subject::NewDomain { uuid, .. } => domain(uuid.unwrap_or_default()),
            Subject::Person(person) => self.user(&person.principal),
        }
    }
}

/// Who asks to do what from where: what the questions of a list have in common.
#[derive(Debug)]
pub(crate) struct Asker<'a> {
    first: Query<'a>,
    kind: Kind,
    pub(crate) uid: EntityUid,
    pub(crate) groups: HashSet<EntityUid>,
    action: EntityUid,
    context: Context,
}

impl<'a> Asker<'a> {
    pub(crate) fn new(query: &Query<'a>, names: &Names, groups: &Groups) -> Result<Self, String> {
        // a socket that takes both kinds of addresses writes 10.1.2.3 as ::ffff:10.1.2.3
        let address = names.used.has("address").then(|| {
            let address = query.peer.to_canonical().to_string();
            ("address".to_owned(), RestrictedExpression::new_ip(address))
        });
        let acting = query.acting.map(|acting| {
            let uid = RestrictedExpression::new_entity_uid(names.user(acting));
            ("acting".to_owned(), uid)
        });
        let context = Context::from_pairs(address.into_iter().chain(acting))
            .map_err(|error| error.to_string())?;
        Ok(Self {
            first: *query,
            kind: Kind::of(&query.on),
            uid: names.user(&query.person.principal),
            groups: groups_of(query.person, names, groups),
            action: names.action(query.action),
            context,
        })
    }

    /// Returns whether another question is asked by the same person, to do the same to the same kind of thing, from the same place.
    pub(crate) fn asks(&self, query: &Query<'_>) -> bool {
        let same_person =
            std::ptr::eq(self.first.person, query.person) || self.first.person == query.person;
        same_person
            && self.first.action == query.action
            && self.kind == Kind::of(&query.on)
            && self.first.peer == query.peer
            && self.first.acting == query.acting
    }
}

/// Questions of one asker, and all that they speak of.
#[derive(Debug)]
pub(crate) struct Scene {
    entities: Entities,
    requests: Vec<(EntityUid, HashSet<EntityUid>, Request)>,
}

impl Scene {
    /// Puts together what the first of the questions speak of, up to one about a domain that has the UUID of an earlier one; returns how many.
    pub(crate) fn new(
        asker: &Asker<'_>,
        queries: &[Query<'_>],
        names: &Names,
        groups: &Groups,
    ) -> Result<Self, String> {
        let mut users: BTreeMap<&Principal, HashSet<EntityUid>> = BTreeMap::new();
        let mut entities: Vec<Entity> = Vec::with_capacity(queries.len() + 8);
        let mut requests = Vec::with_capacity(queries.len());
        let mut seen: HashSet<EntityUid> = HashSet::with_capacity(queries.len());
        users.insert(&asker.first.person.principal, asker.groups.clone());
        if let Some(acting) = asker.first.acting {
            users
                .entry(acting)
                .or_insert_with(|| named_groups(acting, names, groups));
        }
        for query in queries {
            let uid = names.resource(&query.on);
            if !seen.insert(uid.clone()) && asker.kind == Kind::Domain {
                break;
            }
            let above = match query.on {
                Subject::Person(other) => {
                    // who asks about himself is in the groups that he asks with
                    let known = users
                        .entry(&other.principal)
                        .or_insert_with(|| groups_of(other, names, groups));
                    known.clone()
                }
                Subject::Domain(facts) => {
                    if let Some(lease) = facts.lease.filter(|_| names.used.has("lease")) {
                        users
                            .entry(&lease.user)
                            .or_insert_with(|| named_groups(&lease.user, names, groups));
                    }
                    HashSet::new()
                }
                Subject::Host | Subject::UnknownDomain | Subject::NewDomain { .. } => {
                    HashSet::new()
                }
            };
            if asker.kind == Kind::Domain {
                entities.push(domain(&query.on, &uid, names)?);
            }
            let request = Request::new(
                asker.uid.clone(),
                asker.action.clone(),
                uid.clone(),
                asker.context.clone(),
                None,
            )
            .map_err(|error| error.to_string())?;
            requests.push((uid, above, request));
        }
        for (principal, groups) in users {
            entities.push(user(principal, groups, names)?);
        }
        if asker.kind == Kind::Host || names.used.has("host") {
            entities.push(names.host.clone());
        }
        if let Some((_, actions)) = names.actions.get(&asker.first.action) {
            entities.extend(actions.iter().cloned());
        }
        let entities =
            Entities::from_entities(entities, None).map_err(|error| error.to_string())?;
        Ok(Self { entities, requests })
    }

    pub(crate) fn entities(&self) -> &Entities {
        &self.entities
    }

    /// Returns for each question the resource, its groups and the request.
    pub(crate) fn requests(
        &self,
    ) -> impl ExactSizeIterator<Item = &(EntityUid, HashSet<EntityUid>, Request)> {
        self.requests.iter()
    }
}

fn user(
    principal: &Principal,
    groups: HashSet<EntityUid>,
    names: &Names,
) -> Result<Entity, String> {
    let parts = Parts::of(principal);
    let attributes = [
        ("primary", parts.primary()),
        ("instance", parts.instance),
        ("realm", parts.realm),
    ];
    let attributes = attributes
        .into_iter()
        .filter(|(name, _)| names.used.has(name))
        .map(|(name, value)| (name, text(value)));
    entity(&names.user(principal), attributes, groups, [])
}

fn domain(subject: &Subject<'_>, uid: &EntityUid, names: &Names) -> Result<Entity, String> {
    let nobodys = Metadata::default();
    let (name, state, hypervisor, metadata, lease) = match subject {
        Subject::Domain(facts) => (
            facts.name.as_str(),
            facts.state.name(),
            facts.hypervisor,
            facts.metadata?,
            facts.lease,
        ),
        Subject::NewDomain { name, .. } => (name.as_str(), NEW, "", &nobodys, None),
        Subject::UnknownDomain | Subject::Host | Subject::Person(_) => {
            ("", DomainState::Unknown.name(), "", &nobodys, None)
        }
    };
    let used = &names.used;
    let mut attributes = Vec::with_capacity(7);
    let plain = [
        ("name", name),
        (
            "class",
            metadata.class.as_ref().map_or("", |class| class.as_str()),
        ),
        ("state", state),
        ("hypervisor", hypervisor),
    ];
    let plain = plain.into_iter().filter(|(name, _)| used.has(name));
    attributes.extend(plain.map(|(name, value)| (name, text(value))));
    if used.has("owners") {
        let owners = metadata
            .owners
            .iter()
            .map(|owner| RestrictedExpression::new_entity_uid(names.user(owner)));
        attributes.push(("owners", RestrictedExpression::new_set(owners)));
    }
    if used.has("host") {
        let host = RestrictedExpression::new_entity_uid(names.host_uid.clone());
        attributes.push(("host", host));
    }
    if let Some(lease) = lease.filter(|_| used.has("lease")) {
        let user = RestrictedExpression::new_entity_uid(names.user(&lease.user));
        let fields = [
            ("user".to_owned(), user),
            ("job".to_owned(), text(&lease.job)),
        ];
        let record = RestrictedExpression::new_record(fields).map_err(|error| error.to_string())?;
        attributes.push(("lease", record));
    }
    let labels = metadata
        .labels
        .iter()
        .filter(|_| used.tags)
        .map(|(name, value)| (name.as_str().to_owned(), text(value.as_str())));
    entity(uid, attributes, [], labels)
}

fn entity(
    uid: &EntityUid,
    attributes: impl IntoIterator<Item = (&'static str, RestrictedExpression)>,
    parents: impl IntoIterator<Item = EntityUid>,
    tags: impl IntoIterator<Item = (String, RestrictedExpression)>,
) -> Result<Entity, String> {
    let attributes = attributes
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    Entity::new_with_tags(uid.clone(), attributes, parents, tags).map_err(|error| error.to_string())
}

fn text(text: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(text.to_owned())
}

fn groups_of(person: &Person, names: &Names, groups: &Groups) -> HashSet<EntityUid> {
    let mut all = named_groups(&person.principal, names, groups);
    if let UnixGroups::Known(unix) = &person.unix_groups {
        all.extend(
            unix.iter()
                .map(|name| names.group(&format!("{UNIX}{name}"))),
        );
    }
    all
}

fn named_groups(principal: &Principal, names: &Names, groups: &Groups) -> HashSet<EntityUid> {
    groups.of(principal).map(|name| names.group(name)).collect()
}
