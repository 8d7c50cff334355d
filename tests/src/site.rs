//! A site with a batch system: a machine whose guests are compute nodes, and a desk where the controller runs.
//!
//! ```text
//! desk 10.77.0.254 ── labbr ── alpha 10.77.0.1 ── guests ─┬─ node 10.77.0.101
//! controller, people           libvirtd, xmand            └─ node 10.77.0.102
//! ```

use std::fs;
use std::sync::Arc;

use crate::cell::Cell;
use crate::child::{PATIENCE, Process, run};
use crate::image::{GROUPS, PEOPLE};
use crate::libvirtd::Libvirtd;
use crate::node::{BRIDGE, Node};
use crate::realm::Realm;

/// The address of the first node; the others follow.
const FIRST_NODE: u8 = 101;

/// One machine, the guests on its wire, and the desk.
#[derive(Debug)]
pub struct Site {
    /// The machine, 10.77.0.1: `Host::builder().beside(&site.alpha)` puts an xmand there, whom everybody on the wire can call.
    pub alpha: Libvirtd,
    _kdcs: [Process; 2],
    desk: Arc<Cell>,
    krb5_conf: String,
}

impl Site {
    /// The number of processors that a site's machine lends to each of its nodes.
    pub const CPUS: u32 = 1;

    /// Opens the machine and the desk, with no nodes yet, and lets them and the nodes reach the realm's KDC.
    #[track_caller]
    #[must_use]
    pub fn new(realm: &Realm) -> Self {
        let desk = Arc::new(Cell::with_network("desk"));
        desk.ip(&["link", "add", "labbr", "type", "bridge"]);
        desk.ip(&["address", "add", "10.77.0.254/24", "dev", "labbr"]);
        desk.ip(&["link", "set", "labbr", "up"]);
        let cell = Cell::with_network_and_groups("alpha");
        cell.plug_into(&desk, 1);
        cell.ip(&["link", "add", BRIDGE, "type", "bridge"]);
        cell.ip(&["address", "del", "10.77.0.1/24", "dev", "eth0"]);
        cell.ip(&["link", "set", "eth0", "master", BRIDGE]);
        cell.ip(&["address", "add", "10.77.0.1/24", "dev", BRIDGE]);
        cell.ip(&["link", "set", BRIDGE, "up"]);
        add_people(&desk);
        let alpha = Libvirtd::inside(cell, false, Some(Arc::clone(&desk)));
        Self {
            _kdcs: [realm.serve_around(&desk), realm.serve_around(alpha.cell())],
            alpha,
            desk,
            krb5_conf: realm.krb5_conf_by("10.77.0.1"),
        }
    }

    /// Returns the cell in which the controller runs and people sit.
    #[must_use]
    pub fn desk(&self) -> &Arc<Cell> {
        &self.desk
    }

    /// Returns the text of the krb5.conf with which programs in a node find the realm.
    #[must_use]
    pub fn krb5_conf(&self) -> &str {
        &self.krb5_conf
    }

    /// Gives nodes their places on the wire, and everybody everybody's names. Returns each one's number.
    #[track_caller]
    pub(crate) fn introduce(&self, nodes: &mut [Node]) -> Vec<u8> {
        let numbers: Vec<_> = (FIRST_NODE..).take(nodes.len()).collect();
        let names: String = nodes
            .iter()
            .zip(&numbers)
            .map(|(node, number)| {
                let name = node.name();
                format!("10.77.0.{number} {name} {name}.xman.test\n")
            })
            .collect();
        let mut hosts = String::new();
        for cell in [&*self.desk, self.alpha.cell()] {
            let path = cell.folder().join("etc/hosts");
            hosts = fs::read_to_string(&path).expect("our own file");
            hosts.push_str(&names);
            // In place: the cell has mounted this very file.
            fs::write(&path, &hosts).expect("our own file");
        }
        for node in nodes {
            node.put("/etc/hosts", 0o644, &hosts);
            node.put("/etc/krb5.conf", 0o644, &self.krb5_conf);
        }
        numbers
    }

    /// Defines and starts nodes that are complete.
    #[track_caller]
    pub(crate) fn run_nodes(&self, nodes: &[&Node]) {
        for node in nodes {
            self.alpha.define(node.guest());
            self.alpha.virsh(&["start", node.name()]).success();
        }
        for node in nodes {
            node.wait_until_up();
        }
    }
}

/// Gives a cell accounts for those who have jobs.
#[track_caller]
fn add_people(cell: &Cell) {
    for (file, more) in [("/etc/passwd", PEOPLE), ("/etc/group", GROUPS)] {
        let mut text = fs::read_to_string(file).expect("every system has it");
        text.push_str(more);
        let ours = cell.outside(file);
        fs::write(&ours, text).expect("our own folder");
        let mut mount = cell.command("mount");
        mount.arg("--bind").arg(&ours).arg(file);
        run(mount, b"", PATIENCE).success();
    }
}
