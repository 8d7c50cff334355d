//! `check`: everything that hook.toml names, tried as the hooks would; and `generic status`.

use std::{ops::ControlFlow, sync::Arc, time::Duration};

use xman_client::{
    Address, Interrupt, fleet,
    protocol::{Reply, Request, Whoami},
};

use crate::{
    act::{Actor, failed},
    args::At,
    config::Config,
    queue::Queue,
    told::{Told, one_line},
    verdict::{Class, Outcome},
};

/// How long one host may take.
const HOST_LIMIT: Duration = Duration::from_secs(15);
/// Hosts asked at once.
const WIDTH: usize = 64;

/// Prints a line for each finding, and says whether all is well.
pub(crate) async fn check(config: &Config, told: &Told, interrupt: Interrupt) -> Outcome {
    let mut wrong = 0usize;
    let mut say = |is_well: bool, line: String| {
        wrong += usize::from(!is_well);
        let mark = if is_well { "ok    " } else { "WRONG " };
        print(&format!("{mark}{line}"));
    };
    say(true, format!("{}: it can be read", config.path.display()));
    match std::fs::File::open(&config.keytab) {
        Ok(_) => say(true, format!("keytab {}", config.keytab.display())),
        Err(error) => say(
            false,
            format!("keytab {}: {error}", config.keytab.display()),
        ),
    }
    let queue = match Queue::open(&config.queue_dir) {
        Ok(queue) => queue,
        Err(error) => {
            say(false, format!("queue-dir: {error}"));
            return Outcome::new(Class::Broken, "");
        }
    };
    match queue.content() {
        Ok(content) => {
            for spoilt in &content.spoilt {
                say(
                    false,
                    format!("an end cannot be read and was put aside: {spoilt}"),
                );
            }
            let waiting = content.ends.len();
            say(
                true,
                format!(
                    "queue-dir {}: {waiting} ends wait",
                    config.queue_dir.display()
                ),
            );
        }
        Err(error) => say(false, format!("queue-dir: {error}")),
    }
    if config.user_realm.is_none() {
        print("note  user-realm is not set: hosts do not learn whose job it is");
    }
    let mut hosts: Vec<Address> = Vec::new();
    let mut nodes = 0usize;
    for node in config.nodes.names() {
        nodes += 1;
        match config.nodes.place(node) {
            Ok(place) if !hosts.contains(&place.host) => hosts.push(place.host),
            Ok(_) => {}
            Err(error) => say(false, error.to_string()),
        }
    }
    say(
        nodes > 0,
        format!(
            "{nodes} nodes are mapped by name, to {} hosts (nodes of a pattern are not counted)",
            hosts.len()
        ),
    );
    let actor = Actor {
        config,
        told,
        interrupt,
        queue,
        kdc_is_silent: Arc::default(),
    };
    let answers = fleet::all(&hosts, WIDTH, |host| whoami(&actor, host)).await;
    for (host, answer) in hosts.iter().zip(answers) {
        match answer {
            Ok(sentence) => say(true, format!("{host}: {sentence}")),
            Err(sentence) => say(false, sentence),
        }
    }
    if wrong == 0 {
        Outcome::new(Class::Done, "")
    } else {
        Outcome::new(Class::Broken, "")
    }
}

async fn whoami(actor: &Actor<'_>, host: &Address) -> Result<String, String> {
    let mut caller = actor.caller(host, HOST_LIMIT, 2);
    let request = Request::Whoami(Whoami::default());
    match caller.ask(&request, |_| ControlFlow::Continue(())).await {
        Ok(Reply::Whoami(identity)) => match &actor.config.principal {
            Some(principal) if *principal != identity.principal => Err(format!(
                "{host}: it takes us for {}, and hook.toml says {principal}: the keytab's first key is used, so give it that one alone",
                identity.principal
            )),
            Some(_) | None => Ok(format!("it takes us for {}", identity.principal)),
        },
        Ok(_) => Err(format!("{host}: that was no answer to whoami")),
        Err(failure) => Err(failed(&failure, host).sentence),
    }
}

/// Prints how domains stand, one line each.
pub(crate) async fn status(actor: &Actor<'_>, at: &At, limit: Duration) -> Result<Outcome, String> {
    let places = match (&at.host, &at.domain, &at.node) {
        (Some(host), Some(domain), _) => vec![(host.clone(), domain.clone())],
        (_, _, Some(nodes)) => {
            let nodes = xman_client::HostSet::nodes(nodes).map_err(|error| error.to_string())?;
            let mut places = Vec::new();
            for node in &nodes {
                let place = actor
                    .config
                    .nodes
                    .place(node.as_str())
                    .map_err(|error| error.to_string())?;
                places.push((place.host, place.domain));
            }
            places
        }
        (Some(_) | None, Some(_) | None, None) => return Err("no domain is named".to_owned()),
    };
    let mut class = Class::Done;
    let mut sentences = Vec::new();
    for (host, domain) in places {
        let pattern = glob::Pattern::escape(&domain.to_string());
        match crate::watch::status(actor, &host, vec![pattern], limit).await {
            Ok(rows) if rows.is_empty() => {
                class = class.max(Class::Forbidden);
                sentences.push(format!("{host}: there is no domain '{domain}' that takes part, or the hook's principal may not see it"));
            }
            Ok(rows) => rows.iter().for_each(|row| print(&row.to_string())),
            Err(outcome) => {
                class = class.max(outcome.class);
                sentences.push(outcome.sentence);
            }
        }
    }
    Ok(Outcome::new(class, sentences.join("; ")))
}

fn print(line: &str) {
    let _ = std::io::Write::write_all(
        &mut std::io::stdout(),
        format!("{}\n", one_line(line)).as_bytes(),
    );
}
