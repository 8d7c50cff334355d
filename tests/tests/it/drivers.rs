//! Several hypervisors under one xmand: guests and containers in one list, and one driver's trouble that is nobody else's.

use xman_tests::{Container, LXC, Libvirtd};

#[test]
fn container_counts_pauses_reboots_and_goes_down_under_a_private_libvirtd() {
    let libvirtd = Libvirtd::with_containers();
    let container = Container::new("cell");
    libvirtd.run_container(&container);
    container.keeps_counting();
    libvirtd.virsh_on(LXC, &["suspend", "cell"]).success();
    container.stands_still();
    libvirtd.virsh_on(LXC, &["resume", "cell"]).success();
    container.keeps_counting();
    // libvirt 9.0 says that it has told a container's initctl, also where there is none, and then sends no signal.
    libvirtd
        .virsh_on(LXC, &["reboot", "cell", "--mode", "signal"])
        .success();
    container.wait_until_up_again(2);
    libvirtd
        .virsh_on(LXC, &["shutdown", "cell", "--mode", "signal"])
        .success();
    libvirtd.wait_state_on(LXC, "cell", "shut off");
    assert!(container.said().ends_with("down\n"), "{}", container.said());
}
