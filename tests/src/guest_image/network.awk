# From flattened network_data.json: "link MAC MTU", "address MAC FAMILY IP MASK", "route MAC FAMILY NET MASK GATEWAY".
BEGIN { FS = "\t" }
{ v[$1] = $2 }
END {
    for (i = 0; ("/links/" i "/id") in v; i++) {
        mac = tolower(v["/links/" i "/ethernet_mac_address"])
        macs[v["/links/" i "/id"]] = mac
        mtu = v["/links/" i "/mtu"]
        print "link", mac, (mtu ~ /^[0-9]+$/ ? mtu : 0)
    }
    for (i = 0; ("/networks/" i "/type") in v; i++) {
        n = "/networks/" i
        if (!((n "/ip_address") in v) || !(v[n "/link"] in macs)) continue
        mac = macs[v[n "/link"]]
        family = (v[n "/ip_address"] ~ /:/) ? 6 : 4
        mask = v[n "/netmask"]
        print "address", mac, family, v[n "/ip_address"], (mask == "" ? "-" : mask)
        for (r = 0; (n "/routes/" r "/gateway") in v; r++)
            print "route", mac, family, v[n "/routes/" r "/network"], v[n "/routes/" r "/netmask"], v[n "/routes/" r "/gateway"]
        if ((n "/gateway") in v)
            print "route", mac, family, (family == 6 ? "::" : "0.0.0.0"), (family == 6 ? "::" : "0.0.0.0"), v[n "/gateway"]
    }
}
