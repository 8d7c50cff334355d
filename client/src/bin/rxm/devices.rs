//! `attach` and `detach`: disks and network interfaces.

use clap::{Args, Subcommand, ValueEnum};
use xman_common::{
    name::{LinkName, Mac, Tag},
    protocol::{
        Attach, Attached, Detach, Device, Disk, DiskFormat, Interface, Link, Request, Verb,
    },
};

use crate::{
    change::{Deed, carry_out},
    exit::Tally,
    setting::{Setting, Stop},
};

/// What `rxm help attach` says after the options.
pub(crate) const ATTACH_HELP: &str = "\
Disks lie below folders that the host's administrator has named ([devices] in xmand.toml), and interfaces go to networks and bridges named there.

Examples:
  rxm attach disk skirit80/web /var/lib/libvirt/images/data.raw
  rxm attach disk skirit80/web /var/lib/libvirt/images/data.qcow2 --format qcow2 --target vdc --config
  rxm attach disk skirit80/web /var/lib/libvirt/images/debian.iso --cdrom --config
  rxm attach interface skirit80/web --network default
  rxm attach interface skirit80/web --bridge br0 --mac 52:54:00:12:34:56 --model virtio --config

JSON: the fields of list, verb, and device: the disk's name in the guest, or the interface's address.";

/// What `rxm help detach` says after the options.
pub(crate) const DETACH_HELP: &str = "\
A guest that runs is asked to let go of it, and waited for as long as --timeout allows.

Examples:
  rxm detach disk skirit80/web vdb
  rxm detach disk skirit80/web vdb --config        from the definition too
  rxm detach interface skirit80/web 52:54:00:12:34:56";

/// What domains get.
#[derive(Debug, Subcommand)]
pub(crate) enum NewDevice {
    /// A disk: an image or a block device of the host
    Disk(NewDisk),
    /// A network interface
    Interface(NewInterface),
}

/// What domains lose.
#[derive(Debug, Subcommand)]
pub(crate) enum OldDevice {
    /// A disk
    Disk {
        /// NAME, UUID or HOST/NAME
        domain: String,
        /// Its name in the guest, as vdb
        #[arg(value_name = "TARGET")]
        target: Tag,
        /// From the definition too (of a domain that is off: from there only)
        #[arg(long)]
        config: bool,
    },
    /// A network interface
    Interface {
        /// NAME, UUID or HOST/NAME
        domain: String,
        /// Its address, as 52:54:00:12:34:56
        #[arg(value_name = "MAC")]
        mac: Mac,
        /// From the definition too (of a domain that is off: from there only)
        #[arg(long)]
        config: bool,
    },
}

/// Arguments of `attach disk`.
#[derive(Debug, Args)]
pub(crate) struct NewDisk {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// The image or block device, by its absolute path on the host
    #[arg(value_name = "PATH")]
    pub(crate) path: String,
    /// Its name in the guest: vdb is a virtio disk, sdb SCSI, hdb IDE, xvdb Xen's [default: the next free one]
    #[arg(long)]
    pub(crate) target: Option<Tag>,
    /// The format of the image; it is never guessed
    #[arg(long, value_enum, default_value_t = ImageFormat::Raw)]
    pub(crate) format: ImageFormat,
    /// The guest may only read it
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Other domains may have it as well, each of them with this option; only raw images
    #[arg(long)]
    pub(crate) shareable: bool,
    /// It is a CD-ROM
    #[arg(long)]
    pub(crate) cdrom: bool,
    /// In the definition too (for a domain that is off: there only)
    #[arg(long)]
    pub(crate) config: bool,
}

/// Formats of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageFormat {
    /// Bytes as they are
    Raw,
    /// QEMU's own
    Qcow2,
}

/// Arguments of `attach interface`.
#[derive(Debug, Args)]
pub(crate) struct NewInterface {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// One of libvirt's networks that it is plugged into
    #[arg(long, value_name = "NAME", required_unless_present = "bridge")]
    pub(crate) network: Option<LinkName>,
    /// A bridge of the host that it is plugged into
    #[arg(long, value_name = "NAME", conflicts_with = "network")]
    pub(crate) bridge: Option<LinkName>,
    /// Its address [default: the host makes one up]
    #[arg(long)]
    pub(crate) mac: Option<Mac>,
    /// The kind of card that the guest sees, as virtio or e1000 [default: the hypervisor's own]
    #[arg(long)]
    pub(crate) model: Option<Tag>,
    /// In the definition too (for a domain that is off: there only)
    #[arg(long)]
    pub(crate) config: bool,
}

/// `rxm attach`
pub(crate) async fn attach(setting: &Setting, device: NewDevice) -> Result<Tally, Stop> {
    match device {
        NewDevice::Disk(disk) => attach_disk(setting, disk).await,
        NewDevice::Interface(interface) => attach_interface(setting, interface).await,
    }
}

async fn attach_disk(setting: &Setting, args: NewDisk) -> Result<Tally, Stop> {
    let NewDisk {
        domain,
        path,
        target,
        format,
        read_only,
        shareable,
        cdrom,
        config,
    } = args;
    let past = format!("has {path}");
    let device = Device::Disk(Disk {
        source: path,
        target,
        format: match format {
            ImageFormat::Raw => DiskFormat::Raw,
            ImageFormat::Qcow2 => DiskFormat::Qcow2,
        },
        read_only,
        shareable,
        cdrom,
    });
    give(setting, domain, device, config, &past).await
}

async fn attach_interface(setting: &Setting, args: NewInterface) -> Result<Tally, Stop> {
    let NewInterface {
        domain,
        network,
        bridge,
        mac,
        model,
        config,
    } = args;
    let (past, link) = match (network, bridge) {
        (Some(name), _) => (format!("is on the network {name}"), Link::Network(name)),
        (None, Some(name)) => (format!("is on the bridge {name}"), Link::Bridge(name)),
        (None, None) => return Err(Stop::Usage("say --network or --bridge".to_owned())),
    };
    let device = Device::Interface(Interface { link, mac, model });
    give(setting, domain, device, config, &past).await
}

async fn give(
    setting: &Setting,
    domain: String,
    device: Device,
    config: bool,
    past: &str,
) -> Result<Tally, Stop> {
    let request = &|domain| {
        Request::Attach(Attach {
            domain,
            device: device.clone(),
            config,
        })
    };
    carry_out(setting, &[domain], Deed::new(Verb::Attach, past, request)).await
}

/// `rxm detach`
pub(crate) async fn detach(setting: &Setting, device: OldDevice) -> Result<Tally, Stop> {
    let (domain, device, config) = match device {
        OldDevice::Disk {
            domain,
            target,
            config,
        } => (domain, Attached::Disk(target), config),
        OldDevice::Interface {
            domain,
            mac,
            config,
        } => (domain, Attached::Interface(mac), config),
    };
    let past = match &device {
        Attached::Disk(target) => format!("{target} is detached"),
        Attached::Interface(mac) => format!("{mac} is detached"),
    };
    let request = &|domain| {
        Request::Detach(Detach {
            domain,
            device: device.clone(),
            config,
        })
    };
    carry_out(setting, &[domain], Deed::new(Verb::Detach, &past, request)).await
}
