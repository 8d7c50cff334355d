//! `save`, `restore`, `discard` and `images`: domains whose memory is on a disk.

use std::{
    ops::ControlFlow,
    sync::{Mutex, PoisonError},
};

use clap::Args;
use serde_json::{Value, json};
use uuid::Uuid;
use xman_client::{
    Address, Caller, Event, Explanation, Failure, Kind, caller::may_have_happened, fleet,
};
use xman_common::{
    name::{DomainRef, Tag},
    protocol::{
        Code, ImageRow, Images, Item, JobRow, OnDomain, OnImage, Reply, Request, RestoreFrom,
        SaveTo, Start, Verb,
    },
};

use crate::{
    change::{
        Deed, HOSTS, HostWork, by_host, carry_out, change, confirm, hosts_of, may, rehearse, rested,
    },
    exit::Tally,
    heard::conclude,
    job::{Meter, follow, listed},
    options::{DomainsArgs, Format},
    output::{Field, Row, error_value, named},
    setting::{Setting, Stop, misfit},
    target::{self, Found, Purpose, Target, Wanted, split},
    told::{Told, goes_on},
    units::{bytes, moment},
};

/// What `rxm help save` says after the options.
pub(crate) const SAVE_HELP: &str = "\
The next 'rxm start' or 'rxm restore' goes on from where the guest was. Without --to the memory is in the image that libvirt keeps with the domain; \
    --to makes a named one, which stays until it is used, and is used once. Saving is a job: it goes on when you interrupt rxm, 'rxm job cancel' gives \
    it up, and the guest runs on then.

Examples:
  rxm save skirit80/web
  rxm -H @grid save 'grid-*' --yes
  rxm save --to before-upgrade skirit80/web
  rxm save --detach skirit80/web";

/// What `rxm help restore` says after the options.
pub(crate) const RESTORE_HELP: &str = "\
Where there is no saved memory, or it is damaged, nothing is started: 'rxm start' boots. A guest that was paused when it was saved runs on as well, \
    unless you say --paused. --from takes a named image, which is used up by that.

Examples:
  rxm restore skirit80/web
  rxm -H skirit80 restore 'grid-*' --yes
  rxm restore --from skirit80/before-upgrade";

/// What `rxm help images` says after the options.
pub(crate) const IMAGES_HELP: &str = "\
You see the images of the domains that you may see; those of domains that are gone only administrators see.

Examples:
  rxm -H skirit80 images
  rxm -H @grid images -o wide

JSON: host, image, domain, uuid, hypervisor, bytes, saved_ms (when it was saved, milliseconds since 1970).";

/// What `rxm help discard` says after the options.
pub(crate) const DISCARD_HELP: &str = "\
What the guest had in its memory is lost; its disks are not touched.

Examples:
  rxm discard skirit80/web
  rxm discard --image skirit80/before-upgrade";

/// Arguments of `save`.
#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// To this named image in the host's state directory, rather than to the one that libvirt keeps with the domain
    #[arg(long, value_name = "IMAGE")]
    pub(crate) to: Option<Tag>,
    /// Return as soon as it is under way, and print the job's id
    #[arg(long)]
    pub(crate) detach: bool,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// NAME, UUID, HOST/NAME or shell pattern
    #[arg(value_name = "DOMAIN", required_unless_present = "from")]
    pub(crate) domains: Vec<String>,
    /// From a named image, as IMAGE or HOST/IMAGE
    #[arg(long, value_name = "IMAGE", conflicts_with = "domains")]
    pub(crate) from: Option<String>,
    /// Leave the virtual CPUs stopped
    #[arg(long)]
    pub(crate) paused: bool,
}

/// Arguments of `discard`.
#[derive(Debug, Args)]
pub(crate) struct DiscardArgs {
    /// NAME, UUID, HOST/NAME or shell pattern: the memory that libvirt keeps for it
    #[arg(value_name = "DOMAIN", required_unless_present = "image")]
    pub(crate) domains: Vec<String>,
    /// A named image, as IMAGE or HOST/IMAGE
    #[arg(long, value_name = "IMAGE", conflicts_with = "domains")]
    pub(crate) image: Option<String>,
}

/// Domains of one host that are saved at a time: its disks are not faster for more, and the host takes few.
const SAVES: usize = 2;

/// What came of saving one domain.
enum Saved {
    /// It is saved.
    Done(Reply),
    /// It goes on alone.
    LetGo(Uuid, Option<JobRow>),
}

/// How domains are saved.
struct Saving<'a> {
    to: Option<&'a Tag>,
    detach: bool,
    /// Whether it is one alone, whose progress is shown.
    is_alone: bool,
    was_asked: bool,
}

/// `rxm save`
pub(crate) async fn save(setting: &Setting, args: SaveArgs) -> Result<Tally, Stop> {
    let SaveArgs {
        domains,
        to,
        detach,
    } = args;
    let verb = if to.is_some() {
        Verb::SaveTo
    } else {
        Verb::Save
    };
    let wanted = Wanted::parse_all(&domains.domains, setting)?;
    let Found {
        targets,
        callers,
        silent,
    } = target::find(setting, &wanted, Purpose::Change).await?;
    if to.is_some() && targets.len() > 1 {
        let labels: Vec<_> = targets.iter().map(Target::label).collect();
        return Err(Stop::Usage(format!(
            "an image is of one domain, and {} are meant: {}",
            labels.len(),
            named(&labels)
        )));
    }
    if setting.dry_run {
        return rehearse(setting, (verb, None), targets, &silent).await;
    }
    let was_asked = wanted.iter().any(|wanted| wanted.name.is_pattern()) && targets.len() > 1;
    if was_asked {
        confirm(setting, verb, &targets, &silent).await?;
    }
    let mut told = Told::new(setting, verb, hosts_of(&targets) > 1 || !silent.is_empty());
    silent
        .iter()
        .for_each(|(host, error)| told.silent(host, error));
    let saving = &Saving {
        to: to.as_ref(),
        detach,
        is_alone: targets.len() == 1,
        was_asked,
    };
    let past = match &to {
        Some(image) => format!("saved to {image}"),
        None => "saved".to_owned(),
    };
    fleet::each(
        by_host(targets, callers),
        HOSTS,
        |work| save_on_host(setting, saving, work),
        |outcomes| {
            for (target, outcome) in outcomes {
                match outcome {
                    Ok(Saved::Done(reply)) => told.success(&target, &past, reply),
                    Ok(Saved::LetGo(id, job)) => told.let_go(&target, id, job.as_ref()),
                    Err(error) => told.take(&target, &past, Err(error)),
                }
            }
            ControlFlow::Continue(())
        },
    )
    .await;
    told.finish()
}

async fn save_on_host(
    setting: &Setting,
    saving: &Saving<'_>,
    (targets, caller): HostWork,
) -> Vec<(Target, Result<Saved, Explanation>)> {
    let open = &Mutex::new(caller);
    fleet::all(targets, SAVES, |target| async move {
        let taken = open.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut caller = taken.unwrap_or_else(|| setting.caller(&target.address));
        if saving.was_asked {
            caller.rest();
        }
        target.aim(setting, &mut caller);
        let saved = save_one(setting, saving, &mut caller, &target).await;
        // The next domain of this host goes on with the session.
        *open.lock().unwrap_or_else(PoisonError::into_inner) = Some(rested(caller));
        (target, saved)
    })
    .await
}

async fn save_one(
    setting: &Setting,
    saving: &Saving<'_>,
    caller: &mut Caller,
    target: &Target,
) -> Result<Saved, Explanation> {
    let domain = target.domain.clone();
    let request = match saving.to {
        None => Request::Save(OnDomain { domain }),
        Some(image) => Request::SaveTo(SaveTo {
            domain,
            image: image.clone(),
        }),
    };
    let id = Uuid::new_v4();
    let mut meter = if saving.is_alone && !saving.detach {
        Meter::new(&setting.output, target.label())
    } else {
        Meter::silent()
    };
    let mut let_go = false;
    let outcome = follow(setting, caller, &request, id, &mut meter, |event| {
        // What shows that it is under way shows that it can be let go.
        let_go |= saving.detach && matches!(event, Event::Progress(_) | Event::Alive);
        if let_go {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })
    .await;
    meter.finish();
    match outcome {
        Ok(reply @ Reply::Job(_)) => Ok(Saved::Done(reply)),
        Ok(_) => Err(misfit()),
        Err(failure) if let_go && may_have_happened(&failure) => {
            let job = listed(setting, caller, id).await;
            Ok(Saved::LetGo(id, job))
        }
        Err(failure) => Err(of_failure(setting, &failure, &request, target, id)),
    }
}

fn of_failure(
    setting: &Setting,
    failure: &Failure,
    request: &Request,
    target: &Target,
    id: Uuid,
) -> Explanation {
    let explanation = setting.explain_change(failure, &target.address);
    if may_have_happened(failure) {
        return Explanation {
            advice: goes_on(&target.address, id),
            ..explanation
        };
    }
    setting.of_denial(explanation, request)
}

/// `rxm restore`
pub(crate) async fn restore(setting: &Setting, args: RestoreArgs) -> Result<Tally, Stop> {
    let RestoreArgs {
        domains,
        from,
        paused,
    } = args;
    let past = if paused {
        "restored, paused"
    } else {
        "restored"
    };
    let Some(from) = from else {
        let request = &|domain| Request::Restore(Start { domain, paused });
        return carry_out(setting, &domains, Deed::new(Verb::Restore, past, request)).await;
    };
    let (address, image) = find_image(setting, &from).await?;
    let what = format!("a domain from the image {image} on {address}");
    let past = format!("{past} from {image}");
    let request = Request::RestoreFrom(RestoreFrom { image, paused });
    with_image(setting, address, request, &what, &past).await
}

/// `rxm discard`
pub(crate) async fn discard(setting: &Setting, args: DiscardArgs) -> Result<Tally, Stop> {
    let DiscardArgs { domains, image } = args;
    let Some(image) = image else {
        let request = &|domain| Request::DiscardSaved(OnDomain { domain });
        let past = "its saved memory is thrown away";
        return carry_out(
            setting,
            &domains,
            Deed::new(Verb::DiscardSaved, past, request),
        )
        .await;
    };
    let (address, image) = find_image(setting, &image).await?;
    let what = format!("the image {image} on {address}");
    let past = format!("the image {image} is thrown away");
    let request = Request::DiscardImage(OnImage { image });
    with_image(setting, address, request, &what, &past).await
}

/// Makes a call about an image, and tells what came of it.
async fn with_image(
    setting: &Setting,
    address: Address,
    request: Request,
    what: &str,
    past: &str,
) -> Result<Tally, Stop> {
    let verb = request.verb();
    let mut told = Told::new(setting, verb, false);
    let mut caller = setting.caller(&address);
    if setting.dry_run {
        match may(setting, &mut caller, verb, None).await {
            Ok(allowed) => told.rehearse_line(&address, what, None, allowed),
            Err(error) => told.failed_on(&address, error),
        }
        return told.finish();
    }
    match change(setting, &mut caller, &request).await {
        Ok(Reply::Done) => told.done_on(&address, past),
        Ok(reply) => {
            let target = Target {
                address,
                domain: DomainRef::Uuid(Uuid::nil()),
                row: None,
                by: None,
            };
            told.success(&target, past, reply);
        }
        Err(error) => told.failed_on(&address, error),
    }
    told.finish()
}

/// Finds the host that has an image: the one before the slash, the only one there is, or the only one that lists it.
async fn find_image(setting: &Setting, typed: &str) -> Result<(Address, Tag), Stop> {
    let (host, name) = split(typed);
    let image: Tag = name
        .parse()
        .map_err(|error| Stop::Usage(format!("'{typed}': {error}")))?;
    let hosts = match host {
        Some(host) => setting.hosts_before_slash(host)?,
        None => setting.hosts()?,
    };
    setting.check_ticket().await?;
    if let [host] = hosts.as_slice() {
        return Ok((host.clone(), image));
    }
    let heard = ask_all(setting, hosts).await;
    let has_it = |(address, images): &Heard| {
        let has = images
            .as_ref()
            .is_ok_and(|images| images.iter().any(|row| row.image == image));
        has.then(|| address.clone())
    };
    let found: Vec<Address> = heard.iter().filter_map(has_it).collect();
    let is_silent = heard
        .iter()
        .any(|(_, images)| matches!(images, Err(error) if error.code != Code::Denied.name()));
    let labels: Vec<_> = found.iter().map(|host| format!("{host}/{image}")).collect();
    match found.as_slice() {
        [host] if !is_silent => return Ok((host.clone(), image)),
        [] => setting.output.say(&format!(
            "no host that answered shows an image '{image}'; `rxm images` shows those there are, HOST/IMAGE asks one host only"
        )),
        [_] => setting.output.say(&format!(
            "nothing was changed, since a host that does not answer could have an image of that name as well; {} names the one that was found",
            named(&labels)
        )),
        _ => setting.output.say(&format!(
            "several hosts have an image '{image}': {}; say which",
            named(&labels)
        )),
    }
    let mut tally = conclude(setting, &heard);
    tally.failed(Kind::Refused);
    Err(Stop::Code(match found.as_slice() {
        [] | [_] if is_silent => tally.code(),
        _ => crate::exit::FAILED,
    }))
}

/// A host's images, or why it did not tell.
type Heard = (Address, Result<Vec<ImageRow>, Explanation>);

async fn ask_all(setting: &Setting, hosts: Vec<Address>) -> Vec<Heard> {
    fleet::all(hosts, fleet::WIDTH, |address| async move {
        let mut caller = setting.caller(&address);
        let images = ask_one(setting, &mut caller).await;
        (address, images)
    })
    .await
}

async fn ask_one(setting: &Setting, caller: &mut Caller) -> Result<Vec<ImageRow>, Explanation> {
    let (_, items) = setting
        .ask(caller, &Request::Images(Images::default()))
        .await?;
    let image = |item| {
        if let Item::Image(image) = item {
            Ok(image)
        } else {
            Err(misfit())
        }
    };
    items.into_iter().map(image).collect()
}

/// `rxm images`
pub(crate) async fn images(setting: &Setting) -> Result<Tally, Stop> {
    let hosts = setting.hosts()?;
    setting.check_ticket().await?;
    let heard = ask_all(setting, hosts).await;
    let all = || {
        let of = |(address, images): &'_ Heard| -> Vec<(Address, ImageRow)> {
            let images = images.iter().flatten();
            images
                .map(|image| (address.clone(), image.clone()))
                .collect()
        };
        heard.iter().flat_map(of).collect::<Vec<_>>()
    };
    match setting.output.format {
        Format::Json | Format::Yaml => {
            let values = |(address, images): &Heard| match images {
                Ok(images) => images.iter().map(|row| image_value(address, row)).collect(),
                Err(error) => vec![error_value(address, error)],
            };
            let values: Vec<Value> = heard.iter().flat_map(values).collect();
            setting.output.values(values)?;
        }
        Format::Name => {
            for (address, row) in all() {
                setting.output.line(&if heard.len() > 1 {
                    format!("{address}/{}", row.image)
                } else {
                    row.image.to_string()
                })?;
            }
        }
        Format::Table | Format::Wide => {
            let is_wide = setting.output.format == Format::Wide;
            let rows: Vec<_> = all()
                .iter()
                .map(|(address, row)| image_row(address, row, is_wide))
                .collect();
            let is_empty = rows.is_empty() && heard.iter().all(|(_, images)| images.is_ok());
            setting.output.table(headers(is_wide), rows)?;
            if setting.output.is_terminal && is_empty {
                setting.output.note("no images");
            }
        }
    }
    Ok(conclude(setting, &heard))
}

fn headers(is_wide: bool) -> &'static [&'static str] {
    match is_wide {
        false => &["HOST", "IMAGE", "DOMAIN", "SIZE", "SAVED"],
        true => &[
            "HOST",
            "IMAGE",
            "DOMAIN",
            "SIZE",
            "SAVED",
            "UUID",
            "HYPERVISOR",
        ],
    }
}

fn image_row(address: &Address, row: &ImageRow, is_wide: bool) -> Row {
    let mut cells: Vec<Field> = vec![
        address.to_string().into(),
        row.image.to_string().into(),
        row.domain.to_string().into(),
        bytes(row.bytes).into(),
        moment(row.saved_ms / 1000).into(),
    ];
    if is_wide {
        cells.extend([row.uuid.to_string().into(), row.hypervisor.clone().into()]);
    }
    Row::plain(cells)
}

fn image_value(address: &Address, row: &ImageRow) -> Value {
    json!({
        "host": address,
        "image": row.image,
        "domain": row.domain,
        "uuid": row.uuid,
        "hypervisor": row.hypervisor,
        "bytes": row.bytes,
        "saved_ms": row.saved_ms,
    })
}
