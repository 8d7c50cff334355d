//! `--check`: everything that the configuration names is opened as the daemon would open it.

use std::{io, path::Path, time::Duration};

use tokio::{task::spawn_blocking, time::timeout};
use xman_common::gss;
use xman_policy::{cedar, k5login};

use crate::{
    ROOT, audit,
    config::{Authorization, Backend, Config},
    hypervisor::{self, Hypervisors, hostname},
    schedule,
    store::Store,
};

/// How long the KDC may take.
const TICKET_LIMIT: Duration = Duration::from_secs(10);

/// One thing that `--check` looked at.
pub(crate) struct Finding {
    /// What was looked at.
    pub(crate) what: String,
    /// How it is, or what is wrong and what to do.
    pub(crate) how: Result<String, String>,
}

/// Opens everything that the configuration names, as the daemon would.
pub(crate) async fn check(config: &Config, keys: Result<String, String>) -> Vec<Finding> {
    let mut findings = vec![
        Finding {
            what: format!("keytab {}", config.keytab.display()),
            how: keys,
        },
        Finding {
            what: format!("state directory {}", config.state_dir.display()),
            how: Store::check(&config.state_dir).map(ToOwned::to_owned),
        },
        Finding {
            what: "schedule".to_owned(),
            how: schedule::check(&config.state_dir),
        },
        Finding {
            what: format!("syslog {}", config.syslog.display()),
            how: audit::check(&config.syslog).map(|()| "takes records".to_owned()),
        },
    ];
    for address in &config.listen {
        findings.push(Finding {
            what: format!("address {address}"),
            how: match std::net::TcpListener::bind(address) {
                Ok(_) => Ok("free".to_owned()),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    Ok("in use; fine if xmand runs already".to_owned())
                }
                Err(error) => Err(format!("{error}; choose another in `listen`")),
            },
        });
    }
    for backend in &config.authorization.backends {
        match backend {
            Backend::K5login => findings.extend(check_k5login(&config.authorization.k5login)),
            Backend::Cedar => findings.extend(check_cedar(&config.authorization)),
            Backend::External => findings.push(check_authority(&config.authorization)),
        }
    }
    findings.extend(config.devices.disks.iter().map(|folder| Finding {
        what: format!("images {}", folder.display()),
        how: hypervisor::check_images(folder, ROOT),
    }));
    if !config.migration.peers.is_empty() {
        findings.push(Finding {
            what: "migration peers".to_owned(),
            how: check_own_name().await,
        });
    }
    for uri in &config.hypervisors {
        findings.push(Finding {
            what: format!("hypervisor {uri}"),
            how: Hypervisors::check(uri).await,
        });
    }
    findings
}

/// Says who this host is to its peers: the first key of its keytab, for which the KDC must give a ticket.
async fn check_own_name() -> Result<String, String> {
    let advice = "`kinit -k` with the keytab tells more";
    match timeout(TICKET_LIMIT, spawn_blocking(gss::own_ticket)).await {
        Ok(Ok(Ok((own, _)))) if own.as_str().starts_with("xman/") => {
            Ok(format!("know this host as {own}"))
        }
        Ok(Ok(Ok((own, _)))) => Err(format!(
            "would know this host as {own}; the first key of its keytab must be that of xman/HOST"
        )),
        Ok(Ok(Err(error))) => Err(format!("{error}; {advice}")),
        Ok(Err(_)) | Err(_) => Err(format!("the KDC does not answer; {advice}")),
    }
}

fn check_cedar(authorization: &Authorization) -> Vec<Finding> {
    let what = format!("policies {}", authorization.cedar.display());
    let finding = |how| Finding {
        what: what.clone(),
        how,
    };
    match cedar::check(&authorization.cedar, ROOT) {
        Ok(summary) => {
            let unasked = (summary.unix_groups && !authorization.unix_groups).then(|| {
                "they go by Unix groups, so everybody would be denied: set unix-groups = true"
                    .to_owned()
            });
            let warnings = summary.warnings.iter().cloned().chain(unasked).map(Err);
            let well = Ok(format!("hold {summary}"));
            std::iter::once(well).chain(warnings).map(finding).collect()
        }
        Err(trouble) => trouble
            .defects()
            .iter()
            .map(|defect| finding(Err(defect.clone())))
            .collect(),
    }
}

fn check_authority(authorization: &Authorization) -> Finding {
    Finding {
        what: format!("authority {}", authorization.external.display()),
        how: authorization
            .authority(hostname())
            .check()
            .map_err(|error| error.to_string()),
    }
}

fn check_k5login(k5login: &Path) -> Vec<Finding> {
    let mut findings = vec![Finding {
        what: format!(".k5login {}", k5login.display()),
        how: match k5login::load(k5login, ROOT) {
            Ok(list) if list.is_empty() => {
                Err("lists nobody who could ever match; add principals, one a line".to_owned())
            }
            Ok(list) => Ok(format!("lists {} principals", list.len())),
            Err(trouble) => Err(trouble.to_string()),
        },
    }];
    if let Ok(list) = k5login::load(k5login, ROOT) {
        for warning in list.warnings() {
            findings.push(Finding {
                what: format!(".k5login {}", k5login.display()),
                how: Err(warning.to_string()),
            });
        }
    }
    findings
}
