//! `attach` and `detach`: disks and network interfaces.

use xman_common::protocol::{
    Attach, Attached, Detach, Device, Disk, DiskFormat, Interface, Link, Request, Verb,
};

use crate::{
    args::{ImageFormat, NewDevice, NewDisk, NewInterface, OldDevice},
    change::{Deed, carry_out},
    exit::Tally,
    setting::{Setting, Stop},
};

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
